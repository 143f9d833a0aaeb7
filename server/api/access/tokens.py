"""JSON Web Tokens of an OpenID Connect issuer, where one is set (extra `jwt`)."""

import asyncio
from typing import Any

from server.api.access.principal import EVERYTHING, Principal, Scope
from server.errors import BadConfiguration, Unauthorized
from server.logs import get_logger

log = get_logger("adapterd.access")

ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
"""Signatures with a public key: with a shared secret, whoever can check a token could make one."""

LEEWAY_SECONDS = 30

ADAPTERS_CLAIM = "adapterd_adapters"


class Tokens:
    """Checks tokens against the issuer's keys, which are fetched when they are needed and kept for a while."""

    def __init__(self, issuer: str, audience: str, jwks_url: str) -> None:
        """Raises BadConfiguration where PyJWT is not installed."""
        try:
            import jwt
        except ImportError as error:
            raise BadConfiguration("JWT needs PyJWT: pip install 'adapterd[jwt]'", param="jwt_issuer") from error
        self._jwt: Any = jwt
        self._issuer = issuer
        self._audience = audience
        self._keys = jwt.PyJWKClient(jwks_url, cache_keys=True, timeout=5)

    async def principal(self, token: str) -> Principal:
        """Who asks with this token. Raises Unauthorized.

        `sub` names them, `scope` (words) or `scp` (a list) hold `adapterd:infer`, `adapterd:admin`, `adapterd:metrics`,
        and `adapterd_adapters` the patterns of adapters, all of them if there is no such claim.
        """
        try:
            key = await asyncio.to_thread(self._keys.get_signing_key_from_jwt, token)
            claims = self._jwt.decode(
                token,
                key.key,
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


def _principal(claims: dict[str, Any]) -> Principal:
    given = claims.get("scope", claims.get("scp", ""))
    words = given.split() if isinstance(given, str) else [str(one) for one in given]
    scopes = frozenset(scope for scope in Scope if f"adapterd:{scope}" in words)
    adapters = claims.get(ADAPTERS_CLAIM, [EVERYTHING])
    if not isinstance(adapters, list) or not all(isinstance(one, str) for one in adapters):
        raise Unauthorized(f"the token's {ADAPTERS_CLAIM} is no list of names")
    return Principal(f"jwt:{claims['sub']}", scopes, tuple(adapters))
