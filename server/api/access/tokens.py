"""JSON Web Tokens of an OpenID Connect issuer, where one is set (extra `jwt`)."""

import asyncio
from collections.abc import Callable
from typing import Any

from server.api.access.principal import EVERYTHING, Principal, Scope
from server.errors import BadConfiguration, IssuerUnavailable, Unauthorized
from server.logs import get_logger
from server.tracing import OFF, Tracing

log = get_logger("adapterd.access")

ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
"""Signatures with a public key: with a shared secret, whoever can check a token could make one."""

LEEWAY_SECONDS = 30

FETCH_SECONDS = 5.0
"""How long the issuer may take."""

KEPT_SECONDS = 600.0
"""How old the issuer's keys may be before they are fetched again. A key that is withdrawn is good for so long."""

PAUSE_SECONDS = 15.0
"""Between two fetches: tokens that nobody signed must not make this server ask the issuer each time."""

ADAPTERS_CLAIM = "adapterd_adapters"

MAX_SUBJECT = 200
"""Characters of `sub`, which stands in logs and in the history of releases."""


class Tokens:
    """Checks tokens against the issuer's keys, which are fetched when they are needed and kept for a while."""

    def __init__(
        self, issuer: str, audience: str, jwks_url: str, clock: Callable[[], float], tracing: Tracing = OFF
    ) -> None:
        """`clock` gives seconds; only differences count. Raises BadConfiguration where PyJWT is not installed."""
        try:
            import cryptography  # noqa: F401 - without it PyJWT knows shared secrets only
            import jwt
        except ImportError as error:
            raise BadConfiguration("JWT needs PyJWT: pip install 'adapterd[jwt]'", param="jwt_issuer") from error
        self._jwt: Any = jwt
        self._issuer = issuer
        self._audience = audience
        self._url = jwks_url
        self._tracing = tracing
        self._client = jwt.PyJWKClient(jwks_url, cache_jwk_set=False, timeout=FETCH_SECONDS)
        self._clock = clock
        self._keys: dict[str, Any] = {}
        """Key id -> key."""
        self._fetched = -KEPT_SECONDS
        self._tried = -PAUSE_SECONDS
        self._fetching = asyncio.Lock()

    async def principal(self, token: str) -> Principal:
        """Who asks with this token. Raises Unauthorized, or IssuerUnavailable where there are no keys to check it with.

        `sub` names them, `scope` (words) or `scp` (a list) hold `adapterd:infer`, `adapterd:admin`, `adapterd:metrics`,
        and `adapterd_adapters` the patterns of adapters, all of them if there is no such claim.
        """
        try:
            key = await self._key(self._jwt.get_unverified_header(token).get("kid"))
            claims = self._jwt.decode(
                token,
                key,
                algorithms=ALGORITHMS,
                issuer=self._issuer,
                audience=self._audience,
                leeway=LEEWAY_SECONDS,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except self._jwt.PyJWTError as error:
            log.info("token refused", reason=type(error).__name__)
            raise Unauthorized("the token is not valid") from None
        return _principal(claims)

    async def _key(self, kid: Any) -> Any:
        """The issuer's key of this id. Raises Unauthorized where it has none."""
        if not isinstance(kid, str) or not kid:
            raise Unauthorized("the token does not say which key signed it (kid)")
        if not self._fresh(kid):
            async with self._fetching:
                if not self._fresh(kid):  # nobody has fetched them meanwhile
                    await self._fetch()
        if not self._keys:
            raise IssuerUnavailable("the issuer's keys cannot be had at the moment")
        if kid not in self._keys:
            raise Unauthorized("the token is signed with a key that is not the issuer's")
        return self._keys[kid]

    def _fresh(self, kid: str) -> bool:
        """Whether what is known is to be used as it is."""
        now = self._clock()
        if now - self._tried < PAUSE_SECONDS:
            return True
        return kid in self._keys and now - self._fetched < KEPT_SECONDS

    async def _fetch(self) -> None:
        """Where it fails, the old keys stay: while an issuer is down, its tokens are good."""
        self._tried = self._clock()
        try:
            with self._tracing.outgoing("GET", self._url) as headers:
                self._client.headers = headers
                found = await asyncio.to_thread(self._client.get_signing_keys)
        except (self._jwt.PyJWTError, OSError, ValueError) as error:
            log.warning("the issuer's keys cannot be fetched", reason=type(error).__name__)
            return
        # Not all of PyJWT's versions mind a header that calls a published shared secret something else.
        self._keys = {str(key.key_id): key for key in found if key.algorithm_name in ALGORITHMS}
        self._fetched = self._clock()


def _principal(claims: dict[str, Any]) -> Principal:
    subject: str = claims["sub"]
    if not subject or len(subject) > MAX_SUBJECT or not subject.isprintable():
        raise Unauthorized(f"the token's sub is not a name of at most {MAX_SUBJECT} characters")
    given = claims.get("scope", claims.get("scp", ""))
    words = given.split() if isinstance(given, str) else given if isinstance(given, list) else []
    adapters = claims.get(ADAPTERS_CLAIM, [EVERYTHING])
    if not isinstance(adapters, list) or not all(isinstance(one, str) for one in adapters):
        raise Unauthorized(f"the token's {ADAPTERS_CLAIM} is no list of names")
    scopes = frozenset(scope for scope in Scope if f"adapterd:{scope}" in words)
    return Principal(f"jwt:{subject}", scopes, tuple(adapters))
