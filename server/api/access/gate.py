"""In front of all routes: who asks, and whether they may ask this route."""

import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as AsgiScope

from server.api.access.keys import Keys
from server.api.access.principal import ANYONE, Principal, Scope, enter
from server.api.access.rate import Rates
from server.api.access.tokens import Tokens
from server.errors import Forbidden, RateLimited, Unauthorized
from server.settings import Settings

OPEN = ("/livez", "/readyz", "/v2/health/live", "/v2/health/ready")
"""Orchestrators carry no keys."""

ADMIN = ("/admin", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")
METRICS = ("/metrics",)

Refuse = Callable[[AsgiScope, Receive, Send, Exception], Awaitable[None]]


def scope_of(path: str) -> Scope | None:
    """What a path takes; None: nothing. What is not named here is for asking adapters."""
    if path in OPEN or (path.endswith("/health") and path.startswith("/tei/")):
        return None
    if _below(path, ADMIN):
        return Scope.ADMIN
    return Scope.METRICS if _below(path, METRICS) else Scope.INFER


def _below(path: str, prefixes: tuple[str, ...]) -> bool:
    return any(path == prefix or path.startswith(f"{prefix}/") for prefix in prefixes)


class Gate:
    """Keys, tokens and rates of a server."""

    def __init__(self, keys: Keys, tokens: Tokens | None, rates: Rates) -> None:
        self._keys = keys
        self._tokens = tokens
        self._rates = rates

    @classmethod
    def load(cls, settings: Settings, clock: Callable[[], float] = time.monotonic) -> "Gate":
        """As the settings say. Raises BadConfiguration."""
        secret = settings.api_keys.get_secret_value() if settings.api_keys else None
        keys = Keys.load(Path(settings.api_keys_file) if settings.api_keys_file else None, secret)
        tokens = None
        if settings.jwt_issuer and settings.jwt_audience:
            url = settings.jwt_jwks_url or f"{settings.jwt_issuer.rstrip('/')}/.well-known/jwks.json"
            tokens = Tokens(settings.jwt_issuer, settings.jwt_audience, url)
        return cls(keys, tokens, Rates(clock))

    @property
    def closed(self) -> bool:
        """Whether anybody is asked who they are."""
        return bool(self._keys) or self._tokens is not None

    async def admit(self, path: str, headers: Headers) -> Principal:
        """Who asks. Raises Unauthorized, Forbidden or RateLimited."""
        needed = scope_of(path)
        if needed is None or not self.closed:
            return ANYONE
        principal = await self._who(headers)
        if needed not in principal.scopes:
            raise Forbidden(f"key {principal.name!r} does not have the scope {needed.value!r}")
        self._rates.spend(principal)
        return principal

    async def _who(self, headers: Headers) -> Principal:
        kind, _, credential = headers.get("authorization", "").partition(" ")
        credential = credential.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
        if not credential:
            raise Unauthorized("a key is needed: Authorization: Bearer <key>")
        if (principal := self._keys.find(credential)) is not None:
            return principal
        if self._tokens is not None and credential.count(".") == 2:
            return await self._tokens.principal(credential)
        raise Unauthorized("the key is not known")


class Authenticate:
    """Lets requests through whose caller may make them."""

    def __init__(self, app: ASGIApp, gate: Gate, refuse: Refuse) -> None:
        """`refuse` answers with an error in the shape that the path's clients know."""
        self._app = app
        self._gate = gate
        self._refuse = refuse

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Passes the request on, in the caller's name."""
        if scope["type"] == "http":
            try:
                enter(await self._gate.admit(scope["path"], Headers(scope=scope)))
            except (Unauthorized, Forbidden, RateLimited) as error:
                await self._refuse(scope, receive, send, error)
                return
        await self._app(scope, receive, send)
