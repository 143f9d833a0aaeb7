"""Runs the application under uvicorn and tells the person at the terminal that it is up, and how to try it."""

import asyncio
import ctypes
import gc
import json
import math
import socket
import ssl
import sys

import uvicorn
from fastapi import FastAPI
from transformers.utils.logging import disable_progress_bar

from server import logs
from server.app import create_app
from server.blocks import BLOCKS
from server.engine.engine import Engine
from server.engine.warmup import WarmUp
from server.errors import AdapterdError
from server.settings import Settings
from server.tasks import TASKS

GREETING_SECONDS = 5.0
"""How long the greeting waits for the store."""

TRIM_SECONDS = 5.0

LAST_ANSWERS_SECONDS = 1.0
"""How long the requests that are cut off in the end may take to be answered with 503."""

LAST_REFUSALS_SECONDS = 0.5
"""How long new requests are refused in the end, for those who still come: a 503 can be sent again elsewhere, while who
meets a connection that is being closed does not know whether the request was run."""

ARENAS = 2
"""Of glibc's malloc, whose threads take turns on them. It gives eight to each core, and each keeps holes of its own;
but Python's threads allocate little at the same time."""

M_ARENA_MAX = -8
"""mallopt's name for their number, from malloc.h."""


class _Server(uvicorn.Server):
    """uvicorn, which speaks once its sockets listen."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        # What is there now stays until the end: the collector need not look at it each time, half a million objects
        # for a quarter of a second, in which nobody is answered.
        gc.collect()
        gc.freeze()
        await super().startup(sockets)
        self._giving_back = asyncio.get_running_loop().create_task(_give_back_memory())
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            assert isinstance(self.config.app, FastAPI)
            self._warm_up = WarmUp(self.config.app.state.backbone)
            url = f"{'https' if self.config.is_ssl else 'http'}://{host}:{port}"
            print(await _greeting(self.config.app, url), flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Serves on for a while, so that load balancers see /readyz fail before anything is refused."""
        assert isinstance(self.config.app, FastAPI)
        engine: Engine = self.config.app.state.engine
        settings: Settings = self.config.app.state.settings
        loop = asyncio.get_running_loop()
        told = loop.time()
        cutting = loop.call_at(told + settings.shutdown_grace_seconds, engine.cut_off)
        engine.leave()
        # Clients that keep their connections leave with the next answer, and lose nothing when the rest is closed.
        self.server_state.default_headers.append((b"connection", b"close"))
        delay = min(settings.shutdown_delay_seconds, settings.shutdown_grace_seconds)
        await asyncio.sleep(max(0.0, delay - LAST_REFUSALS_SECONDS))
        engine.drain()
        await asyncio.sleep(min(delay, LAST_REFUSALS_SECONDS))
        await super().shutdown(sockets)
        cutting.cancel()
        await asyncio.to_thread(self._warm_up.stop)


async def _give_back_memory() -> None:
    """What has been freed goes back to the operating system now and then. glibc keeps it, in holes that what comes next
    does not always fit: the buffers of a few thousand loads came to forty megabytes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    while trim is not None:
        await asyncio.sleep(TRIM_SECONDS)
        BLOCKS.drop()
        await asyncio.to_thread(trim, 0)


def _limit_arenas() -> None:
    """Before there are threads; where there is no glibc, nothing."""
    if set_option := getattr(ctypes.CDLL(None), "mallopt", None):
        set_option(M_ARENA_MAX, ARENAS)


def run(settings: Settings) -> int:
    """Serves until a signal ends it. Returns the exit status."""
    _limit_arenas()
    logs.configure(settings.log_level, settings.log_format)
    disable_progress_bar()
    try:
        app = create_app(settings)
    except AdapterdError as error:
        print(f"adapterd: {error.message}", file=sys.stderr)
        return 1
    password = settings.ssl_keyfile_password
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
        ssl_keyfile_password=password.get_secret_value() if password else None,
        ssl_ca_certs=settings.ssl_ca_certs,
        ssl_cert_reqs=ssl.CERT_REQUIRED if settings.ssl_ca_certs else ssl.CERT_NONE,
        log_config=None,
        access_log=False,
        timeout_keep_alive=settings.keep_alive_seconds,
        # In shutdown() above, requests are told to end before uvicorn cuts their connections.
        timeout_graceful_shutdown=math.ceil(settings.shutdown_grace_seconds + LAST_ANSWERS_SECONDS),
    )
    try:
        config.load()
    except OSError as error:  # a file that is not there, or not what it should be
        reason = error.strerror or str(error)
        print(f"adapterd: ssl_certfile, ssl_keyfile or ssl_ca_certs cannot be used: {reason}", file=sys.stderr)
        return 1
    server = _Server(config)
    server.run()
    return 0 if server.started else 1


async def _greeting(app: FastAPI, url: str) -> str:
    """The address, and a curl line that works if the store has anything to try."""
    engine: Engine = app.state.engine
    key = ' -H "authorization: Bearer $ADAPTERD_API_KEY"' if app.state.asks_for_keys else ""
    spec = engine.spec
    lines = [
        "",
        f"adapterd serves {spec.name} ({engine.dtype} on {engine.device}) at {url}",
        f"API documentation: {url}/docs",
    ]
    try:
        example = await asyncio.wait_for(_example(engine, url, key), GREETING_SECONDS)
    except AdapterdError as error:
        lines.append(f"The store cannot be read at the moment: {error.message}")
    except TimeoutError:
        lines.append("The store has not answered yet.")
    else:
        lines += example
    return "\n".join([*lines, ""])


async def _example(engine: Engine, url: str, key: str) -> list[str]:
    """A request to the first adapter, as its task takes it."""
    adapters = (await engine.page(limit=1)).adapters
    if not adapters:
        return ["The store is empty; upload an adapter with PUT /admin/adapters/{name}"]
    name = adapters[0].name
    _, manifest, _ = await engine.describe(name)
    task = TASKS.get(manifest.task)
    if task is None:  # made by a later adapterd
        return []
    body = json.dumps({"adapter": name, "inputs": task.route.item(task.sample("What a lovely day in Paris"))})
    return ["Try it:", f"  curl -s {url}{task.route.path}{key} -H 'content-type: application/json' -d '{body}'"]
