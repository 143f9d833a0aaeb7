"""Asks the server on this machine whether it is ready, as the image's health check does: `python -m server.probe`.

`python -m server.probe /livez` asks whether it lives. Standard library only, and the few settings that matter are read
from the environment here: it runs every few seconds, and reading them all takes ten times as long.
"""

import http.client
import os
import ssl
import sys
from collections.abc import Mapping

READY = "/readyz"
TIMEOUT_SECONDS = 2.0
LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""Where one that listens to all is asked."""


def ask(path: str, environment: Mapping[str, str]) -> int:
    """HTTP status of `path`, over TLS where the server has a certificate.

    The certificate is not verified, since it is for another name than this one. Where clients have to show one, this
    shows the server's own. Raises OSError or HTTPException where nobody answers.
    """
    host = environment.get("ADAPTERD_HOST", "127.0.0.1")
    host, port = LOOPBACK.get(host, host), int(environment.get("ADAPTERD_PORT", "8000"))
    certificate = environment.get("ADAPTERD_SSL_CERTFILE")
    if certificate is None:
        connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_SECONDS)
    else:
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        if "ADAPTERD_SSL_CA_CERTS" in environment:
            password = environment.get("ADAPTERD_SSL_KEYFILE_PASSWORD")
            context.load_cert_chain(certificate, environment.get("ADAPTERD_SSL_KEYFILE"), password)
        connection = http.client.HTTPSConnection(host, port, timeout=TIMEOUT_SECONDS, context=context)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


def main(arguments: list[str], environment: Mapping[str, str]) -> int:
    """Exit status: 0 for an answer of 200, else 1 and the reason on standard error."""
    path = arguments[0] if arguments else READY
    try:
        status = ask(path, environment)
    except (OSError, http.client.HTTPException) as error:
        print(f"{path}: {error or type(error).__name__}", file=sys.stderr)
        return 1
    if status != http.HTTPStatus.OK:
        print(f"{path}: {status}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
