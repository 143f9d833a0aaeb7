"""Who did what to the adapters: one line for each request that takes `admin`, done or refused."""

from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as AsgiScope

from server.api.access.gate import route_path, scope_of
from server.api.access.principal import Scope, noted
from server.logs import AUDIT, get_logger

log = get_logger(AUDIT)

MAX_PATH = 500
"""Characters."""


class Audit:
    """Around Authenticate, so that it sees what is refused."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Passes the request on, and tells what became of it. Bodies are not looked at, so no text is in the line."""
        if scope["type"] != "http" or scope_of(scope["method"], route_path(scope)) is not Scope.ADMIN:
            await self._app(scope, receive, send)
            return
        status = 500

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        with noted() as adapters:
            try:
                await self._app(scope, receive, watch)
            finally:
                log.info(
                    "admin",
                    outcome="done" if status < 400 else "refused" if status < 500 else "failed",
                    status=status,
                    method=scope["method"],
                    route=getattr(scope.get("route"), "path", None),
                    path=scope["path"][:MAX_PATH],
                    adapters=[name[:MAX_PATH] for name in adapters],
                    key=scope.get("principal"),
                )
