"""Asks the server that runs here whether it is ready: for a container's HEALTHCHECK, whose image has no curl."""

import ssl
from http.client import HTTPConnection, HTTPException, HTTPSConnection

from server.settings import Settings

TIMEOUT_SECONDS = 2.0

PATH = "/readyz"

THIS_MACHINE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
"""Where to ask a server that listens on all addresses."""


def trouble(settings: Settings) -> str | None:
    """Why the server that these settings start on this machine cannot answer requests; None: it can."""
    try:
        connection = _connection(settings)
    except OSError as error:
        return f"ssl_certfile or ssl_keyfile cannot be used: {error}"
    try:
        connection.request("GET", PATH)
        status = connection.getresponse().status
    except (OSError, HTTPException) as error:
        reason = f"{connection.host}:{connection.port} does not answer: {error or type(error).__name__}"
        if isinstance(connection, HTTPSConnection) and settings.ssl_ca_certs is not None:
            reason += ". If it does not take its own certificate from a client, set ADAPTERD_METRICS_PORT"
        return reason
    finally:
        connection.close()
    return None if status == 200 else f"{PATH} says {status}"


def _connection(settings: Settings) -> HTTPConnection:
    """To the second port if there is one. Where clients have to show a certificate, this shows the server's own.

    Raises OSError for a certificate that is not there or not what it should be.
    """
    if settings.metrics_port is not None:
        return HTTPConnection(_reachable(settings.metrics_address), settings.metrics_port, timeout=TIMEOUT_SECONDS)
    host = _reachable(settings.host)
    if settings.ssl_certfile is None:
        return HTTPConnection(host, settings.port, timeout=TIMEOUT_SECONDS)
    # Its certificate is for the name that clients know it by. Nothing is sent that others must not see.
    unchecked = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    unchecked.check_hostname = False
    unchecked.verify_mode = ssl.CERT_NONE
    if settings.ssl_ca_certs is not None:
        password = settings.ssl_keyfile_password
        unchecked.load_cert_chain(
            settings.ssl_certfile, settings.ssl_keyfile, password.get_secret_value() if password else None
        )
    return HTTPSConnection(host, settings.port, timeout=TIMEOUT_SECONDS, context=unchecked)


def _reachable(host: str) -> str:
    return THIS_MACHINE.get(host, host)
