"""In front of all routes: who asks, and whether they may ask this route."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.routing import compile_path
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as AsgiScope

from server.api.access.keys import Keys, KeySource
from server.api.access.principal import ANYONE, NOBODY, Principal, Scope, acting
from server.api.access.rate import Rates
from server.api.access.tokens import Tokens
from server.errors import AdapterdError, BadConfiguration, Forbidden, Unauthorized
from server.logs import get_logger
from server.settings import Settings
from server.tracing import OFF, Tracing

log = get_logger("adapterd.access")

FOLLOW_SECONDS = 2.0
"""Between two looks at the file of keys."""

TAKES: Mapping[Scope | None, tuple[str, ...]] = {
    # Orchestrators carry no keys. What is asked here says nothing about adapters.
    None: (
        "GET /livez",
        "GET /readyz",
        "GET /tei/health",
        "GET /v2/health/live",
        "GET /v2/health/ready",
    ),
    Scope.METRICS: ("GET /metrics",),
    Scope.INFER: (
        "POST /classify",
        "POST /tag",
        "POST /answer",
        "POST /embed",
        "GET /info",
        "GET /openapi.json",
        "GET /docs",
        "GET /docs/oauth2-redirect",
        "GET /redoc",
        "POST /models/{name}",
        "POST /models/{name}/pipeline/{pipeline}",
        "GET /models/{name}/info",
        "GET /models/{name}/health",
        "POST /tei/predict",
        "POST /tei/{adapter}/predict",
        "POST /tei/embed",
        "POST /tei/{adapter}/embed",
        "GET /tei/info",
        "GET /tei/{adapter}/info",
        "GET /tei/{adapter}/health",
        "POST /vllm/classify",
        "POST /v1/embeddings",
        "GET /v1/models",
        "GET /v1/models/{name:path}",
        "GET /v2",
        "GET /v2/models/{name}",
        "GET /v2/models/{name}/versions/{version}",
        "GET /v2/models/{name}/ready",
        "GET /v2/models/{name}/versions/{version}/ready",
        "POST /v2/models/{name}/infer",
        "POST /v2/models/{name}/versions/{version}/infer",
    ),
}
"""What routes take, None: nothing. Whatever is not named here takes `admin`: routes of /admin, routes that somebody
forgot to name, and paths that lead nowhere."""

_EXACT = {route: scope for scope, routes in TAKES.items() for route in routes if "{" not in route}

_TEMPLATES = [
    (method, compile_path(path)[0], scope)
    for scope, routes in TAKES.items()
    for method, _, path in (route.partition(" ") for route in routes)
    if "{" in path
]

MAX_CREDENTIAL = 8192
"""Characters of a key or token; issuers' tokens have one or two thousand."""

Refuse = Callable[[AsgiScope, Receive, Send, Exception], Awaitable[None]]


def scope_of(method: str, path: str) -> Scope | None:
    """What a request takes; None: nothing."""
    method = "GET" if method == "HEAD" else method
    if (route := f"{method} {path}") in _EXACT:
        return _EXACT[route]
    return next((scope for own, pattern, scope in _TEMPLATES if own == method and pattern.match(path)), Scope.ADMIN)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:  # a name
        return False


class Gate:
    """Keys, tokens and rates of a server."""

    def __init__(self, source: KeySource, tokens: Tokens | None, rates: Rates) -> None:
        """Raises BadConfiguration for keys that cannot be read."""
        self._source = source
        self._keys = source.read() or Keys([])
        self._tokens = tokens
        self._rates = rates
        self.closed = bool(self._keys) or tokens is not None
        """Whether anybody is asked who they are; they are also when the last key has been withdrawn."""

    @classmethod
    def load(cls, settings: Settings, clock: Callable[[], float] = time.monotonic, tracing: Tracing = OFF) -> "Gate":
        """As the settings say. Raises BadConfiguration, also where nobody would be asked for a key though others than
        this machine can ask."""
        file, inline = settings.api_keys_file, settings.api_keys
        source = KeySource(None if file is None else Path(file), None if inline is None else inline.get_secret_value())
        gate = cls(source, _tokens(settings, clock, tracing), Rates(clock))
        if not gate._keys and (file is not None or inline is not None):  # whose last key is withdrawn is not to be open
            raise BadConfiguration("there is no key among the API keys", param="api_keys")
        if not gate.closed and not settings.insecure and not is_loopback(settings.host):
            raise BadConfiguration(
                f"anybody who reaches {settings.host} could upload and delete adapters. Make a key (adapterd key NAME "
                "--scope infer --scope admin --file keys.json) and name the file in ADAPTERD_API_KEYS_FILE; or listen "
                "on 127.0.0.1; or, where something in front of the server asks who it is, set ADAPTERD_INSECURE=true",
                param="host",
            )
        return gate

    async def follow(self, reread: Callable[[bool], None]) -> None:
        """Takes over the keys of the file whenever it has changed, until it is cancelled; `reread(True)` is told when
        it has, `reread(False)` when what is there cannot be used."""
        while self._source.may_change:
            await asyncio.sleep(FOLLOW_SECONDS)
            try:
                keys = await asyncio.to_thread(self._source.read)
            except BadConfiguration as error:
                log.error("the API keys cannot be read, those from before stay", error=error.message)
                reread(False)
            except Exception:
                log.exception("the API keys cannot be read, those from before stay")
                reread(False)
            else:
                if keys is not None:
                    before, self._keys = self._keys, keys
                    log.warning(
                        "the API keys have changed",
                        keys=len(keys),
                        new=sorted(keys.names - before.names),
                        withdrawn=sorted(before.names - keys.names),
                    )
                    reread(True)

    async def who(self, headers: Headers) -> Principal:
        """Who asks. Raises Unauthorized, or IssuerUnavailable."""
        credential = _credential(headers)
        if (principal := self._keys.find(credential)) is not None:
            return principal
        if self._tokens is not None and credential.count(".") == 2:
            return await self._tokens.principal(credential)
        raise Unauthorized("the key is not known")

    def admit(self, principal: Principal, needed: Scope) -> None:
        """Counts a request that the principal may make. Raises Forbidden or RateLimited for one that it may not."""
        if needed not in principal.scopes:
            raise Forbidden(f"key {principal.name!r} does not have the scope {needed.value!r}")
        if needed is Scope.METRICS and not principal.reaches_all:
            raise Forbidden("the series name all adapters: they take a key that reaches all adapters")
        self._rates.spend(principal)


def _tokens(settings: Settings, clock: Callable[[], float], tracing: Tracing) -> Tokens | None:
    issuer, audience = settings.jwt_issuer, settings.jwt_audience
    if not issuer and not audience:
        return None
    if not issuer or not audience:
        missing = "jwt_audience" if issuer else "jwt_issuer"
        raise BadConfiguration(f"ADAPTERD_{missing.upper()} is needed too: a token is for somebody", param=missing)
    url = settings.jwt_jwks_url or f"{issuer.rstrip('/')}/.well-known/jwks.json"
    parts = urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(parts.hostname or "")):
        raise BadConfiguration(
            "ADAPTERD_JWT_JWKS_URL has to begin with https://: who can change what comes from there can make tokens",
            param="jwt_jwks_url",
        )
    return Tokens(issuer, audience, url, clock, tracing)


def _credential(headers: Headers) -> str:
    """The one key or token of a request. Raises Unauthorized."""
    given = headers.getlist("authorization") or headers.getlist("x-api-key")
    if len(given) > 1:
        raise Unauthorized("the request carries several keys")
    credential = given[0] if given else ""
    if "authorization" in headers:
        kind, _, credential = credential.partition(" ")
        if kind.lower() != "bearer":
            raise Unauthorized("the key is to be sent as Authorization: Bearer <key>")
    credential = credential.strip()
    if not credential:
        raise Unauthorized("a key is needed: Authorization: Bearer <key>")
    if len(credential) > MAX_CREDENTIAL or not credential.isascii():
        raise Unauthorized("the key is not known")
    return credential


class Authenticate:
    """Lets requests through whose caller may make them, before anything of their bodies is read."""

    def __init__(self, app: ASGIApp, gate: Gate, refuse: Refuse) -> None:
        """`refuse` answers with an error in the shape that the path's clients know."""
        self._app = app
        self._gate = gate
        self._refuse = refuse

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Passes the request on, in the caller's name."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # nothing speaks WebSocket here, and nobody has said what that would take
            await send({"type": "websocket.close", "code": 1008})
            return
        try:
            principal = await self._identify(scope)
        except AdapterdError as error:
            await self._refuse(scope, receive, send, error)
            return
        with acting(principal):
            await self._app(scope, receive, send)

    async def _identify(self, scope: AsgiScope) -> Principal:
        if not self._gate.closed:
            scope["principal"] = ANYONE.name
            return ANYONE
        needed = scope_of(scope["method"], route_path(scope))
        if needed is None:
            return NOBODY
        principal = await self._gate.who(Headers(scope=scope))
        scope["principal"] = principal.name  # for the logs, also where it is refused
        self._gate.admit(principal, needed)
        return principal


def route_path(scope: AsgiScope) -> str:
    """The path that routes are found by: without that of the application which this one is mounted in."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if path.startswith(f"{root}/") else path
