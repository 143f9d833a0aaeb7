"""Runs the application under uvicorn and tells the person at the terminal that it is up, and how to try it."""

import asyncio
import ctypes
import gc
import json
import math
import os
import socket
import ssl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

import torch
import uvicorn
from fastapi import FastAPI
from transformers.utils.logging import disable_progress_bar

from server import logs
from server.app import create_app, create_metrics_app
from server.backbone.backbone import Backbone
from server.blocks import BLOCKS
from server.engine.engine import Engine
from server.errors import AdapterdError
from server.settings import Settings
from server.tasks import TASKS
from server.wire import Protocol

GREETING_SECONDS = 5.0
"""How long the greeting waits for the store."""

TRIM_SECONDS = 5.0

COLLECT_TURNS = 60
"""Of those, from one look at all objects to the next, which takes 7 to 19 ms for a thousand adapters."""

YOUNG_OBJECTS = 10_000
"""How many more there have to be before the collector looks for cycles among them, instead of 700: what the requests
under way have made is that many, and to look at it again and again took a fourteenth of all processor time."""

LAST_ANSWERS_SECONDS = 1.0
"""How long the requests that are cut off in the end may take to be answered with 503."""

LAST_REFUSALS_SECONDS = 0.5
"""How long new requests are refused in the end, for those who still come: a 503 can be sent again elsewhere, while who
meets a connection that is being closed does not know whether the request was run."""

SWITCH_SECONDS = 0.00005
"""How long a thread may keep Python's lock while others want it, instead of 5 ms. The device's threads need it for
moments, between the products of a batch, and compute nothing until they have it; the event loop keeps it while it reads
one request after the other. At five times the peak on two cores, 92 % of it was answered with 0.05 ms, 84 % with 0.2
(in the median of slices that took turns), and with 2 a tenth less; below the peak, 0.2 ms was quicker by some 3 %."""

ARENAS = 8
"""Of glibc's malloc. It would give eight to each core, and each keeps holes of its own. But the threads that allocate
much need one each: where the small objects of adapters, which stay, lie among what a forward takes and gives back, the
pages between them are lost; with two arenas, a fifteenth of the adapters' memory."""

M_ARENA_MAX = -8
"""mallopt's name for their number, from malloc.h."""


class _MetricsServer(uvicorn.Server):
    """Answers on ADAPTERD_METRICS_PORT, beside the server that signals end."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        """Takes the port, or says why it cannot and ends the process. Raises OSError where somebody else takes it at
        the same moment."""
        assert settings.metrics_port is not None
        config = uvicorn.Config(
            create_metrics_app(app),
            host=settings.metrics_address,
            port=settings.metrics_port,
            lifespan="off",  # the application's own
            ws="none",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=math.ceil(LAST_ANSWERS_SECONDS),
        )
        super().__init__(config)
        self._socket = config.bind_socket()
        try:
            self._socket.listen(config.backlog)  # of two that bind a port at once, the second one fails here
        except OSError:
            self._socket.close()
            raise
        host, port = self._socket.getsockname()[:2]
        self.url = f"http://{host}:{port}"

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """None: they are the other server's."""
        yield

    def start(self) -> None:
        """From here on it answers."""
        self._answering = asyncio.get_running_loop().create_task(self.serve([self._socket]))

    async def stop(self) -> None:
        """Ends it; raises what it failed with."""
        self.should_exit = True
        await self._answering


class _Server(uvicorn.Server):
    """uvicorn, which speaks once it is ready."""

    failure: AdapterdError | None = None
    """Why it ended by itself."""

    def __init__(self, config: uvicorn.Config, beside: _MetricsServer | None) -> None:
        super().__init__(config)
        self._beside = beside

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        # What is there now stays until the end: the collector need not look at it each time, half a million objects
        # for a quarter of a second, in which nobody is answered.
        gc.collect()
        gc.freeze()
        gc.set_threshold(YOUNG_OBJECTS, *gc.get_threshold()[1:])
        await super().startup(sockets)
        self._giving_back = asyncio.get_running_loop().create_task(_give_back_memory())
        if self.started:
            if self._beside is not None:
                self._beside.start()
            self._greeting = asyncio.get_running_loop().create_task(self._greet())

    async def _greet(self) -> None:
        """Once everything has been run; ends the server where nothing can be."""
        assert isinstance(self.config.app, FastAPI)
        engine: Engine = self.config.app.state.engine
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        try:
            await engine.warmed()
        except AdapterdError as error:
            self.failure = error
            self.should_exit = True
            return
        url = f"{'https' if self.config.is_ssl else 'http'}://{host}:{port}"
        print(await _greeting(self.config.app, url, self._beside.url if self._beside else None), flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Serves on for a while, so that load balancers see /readyz fail before anything is refused."""
        assert isinstance(self.config.app, FastAPI)
        engine: Engine = self.config.app.state.engine
        settings: Settings = self.config.app.state.settings
        loop = asyncio.get_running_loop()
        told = loop.time()
        self._greeting.cancel()
        cutting = loop.call_at(told + settings.shutdown_grace_seconds, engine.cut_off)
        engine.leave()
        # Clients that keep their connections leave with the next answer, and lose nothing when the rest is closed.
        self.server_state.default_headers.append((b"connection", b"close"))
        delay = min(settings.shutdown_delay_seconds, settings.shutdown_grace_seconds)
        await asyncio.sleep(max(0.0, delay - LAST_REFUSALS_SECONDS))
        engine.drain()
        await asyncio.sleep(min(delay, LAST_REFUSALS_SECONDS))
        # Requests have been told to end before uvicorn cuts their connections; uploads have not.
        left = told + settings.shutdown_grace_seconds + LAST_ANSWERS_SECONDS - loop.time()
        self.config.timeout_graceful_shutdown = max(1, math.ceil(left))
        await super().shutdown(sockets)
        cutting.cancel()
        if self._beside is not None:  # the last to go, so that probes and scrapes see the others end
            await self._beside.stop()


async def _give_back_memory() -> None:
    """Cycles are looked for, and what has been freed goes back to the operating system, now and then.

    glibc keeps it, in holes that what comes next does not always fit: the buffers of a few thousand loads came to forty
    megabytes.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    for turn in count(1):
        await asyncio.sleep(TRIM_SECONDS)
        # What goes wrong may leave cycles that hold a whole request, and where little happens nobody would come by.
        gc.collect(2 if turn % COLLECT_TURNS == 0 else 1)
        BLOCKS.drop()
        if trim is not None:
            await asyncio.to_thread(trim, 0)


def _limit_arenas() -> None:
    """Before there are threads; where there is no glibc, nothing."""
    if set_option := getattr(ctypes.CDLL(None), "mallopt", None):
        set_option(M_ARENA_MAX, ARENAS)


def _share_processors(backbone: Backbone) -> None:
    """Libraries' own ways that do not suit a process whose device is a CPU."""
    # Tokenizers' own threads look for texts all the time, on the processors of the device's threads, which have twenty
    # times as much to do with each text.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if backbone.dtype == torch.float32 and torch.backends.mkl.is_available():
        # MKL multiplies. All that oneDNN computes is GELU, in two thirds of the time, which is a hundredth of a
        # forward's; and it keeps 35 kB for each number of rows that there has been, up to a thousand.
        torch.backends.mkldnn.set_flags(_enabled=False)


def run(settings: Settings) -> int:
    """Serves until a signal ends it. Returns the exit status."""
    _limit_arenas()
    sys.setswitchinterval(SWITCH_SECONDS)
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
        http=Protocol,
        ws="none",
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
    )
    try:
        config.load()
    except OSError as error:  # a file that is not there, or not what it should be
        reason = error.strerror or str(error)
        print(f"adapterd: ssl_certfile, ssl_keyfile or ssl_ca_certs cannot be used: {reason}", file=sys.stderr)
        return 1
    try:
        beside = None if settings.metrics_port is None else _MetricsServer(app, settings)
    except OSError as error:
        print(f"adapterd: metrics_port: {error.strerror}", file=sys.stderr)
        return 1
    if app.state.backbone.device.type == "cpu":
        _share_processors(app.state.backbone)
    server = _Server(config, beside)
    server.run()
    if server.failure is not None:
        print(f"adapterd: {server.failure.message}", file=sys.stderr)
    return 0 if server.started and server.failure is None else 1


async def _greeting(app: FastAPI, url: str, metrics_url: str | None) -> str:
    """The address, and a curl line that works if the store has anything to try."""
    engine: Engine = app.state.engine
    key = ' -H "authorization: Bearer $ADAPTERD_API_KEY"' if app.state.asks_for_keys else ""
    spec = engine.spec
    lines = [
        "",
        f"adapterd serves {spec.name} ({engine.dtype} on {engine.device}) at {url}",
        f"API documentation: {url}/docs",
    ]
    if metrics_url is not None:
        lines.append(f"Metrics and probes, without a key: {metrics_url}/metrics")
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
