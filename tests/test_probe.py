"""The image's health check, against servers that speak HTTP, HTTPS and HTTPS for clients with certificates only."""

import datetime
import re
import ssl
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from server import probe
from server.settings import Settings


class Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response({"/readyz": 200, "/livez": 503}[self.path])
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


Serve = Callable[..., dict[str, str]]
"""(TLS context) -> the variables of a server."""


@pytest.fixture
def serve() -> Iterator[Serve]:
    started: list[ThreadingHTTPServer] = []

    def start(context: ssl.SSLContext | None = None, **variables: str) -> dict[str, str]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        server.handle_error = lambda *_: None  # a client that is refused is what a test is about
        threading.Thread(target=server.serve_forever).start()
        started.append(server)
        return {"ADAPTERD_HOST": "0.0.0.0", "ADAPTERD_PORT": str(server.server_port), **variables}

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A certificate for another name than this machine's, signed by its own key, which has a password."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "adapterd.example")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    folder = tmp_path_factory.mktemp("pair")
    (folder / "tls.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "tls.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"hunter2"),
        )
    )
    return {
        "ADAPTERD_SSL_CERTFILE": str(folder / "tls.crt"),
        "ADAPTERD_SSL_KEYFILE": str(folder / "tls.key"),
        "ADAPTERD_SSL_KEYFILE_PASSWORD": "hunter2",
    }


def tls(pair: dict[str, str]) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*pair.values())
    return context


def test_an_answer_of_200_is_health(serve: Serve) -> None:
    assert probe.main([], serve()) == 0


def test_any_other_is_not(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    assert probe.main(["/livez"], serve()) == 1
    assert capsys.readouterr().err == "/livez: 503\n"


def test_nobody_answers(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    closed = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    closed.server_close()
    assert probe.main([], {"ADAPTERD_PORT": str(closed.server_port)}) == 1
    assert "/readyz: " in capsys.readouterr().err


def test_a_server_with_a_certificate(serve: Serve, pair: dict[str, str]) -> None:
    variables = serve(tls(pair), **pair)
    assert probe.main([], variables) == 0
    without = {name: value for name, value in variables.items() if name not in pair}
    assert probe.main([], without) == 1


def test_a_server_that_wants_certificates(serve: Serve, pair: dict[str, str]) -> None:
    context = tls(pair)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(pair["ADAPTERD_SSL_CERTFILE"])
    variables = serve(context, **pair)
    assert probe.main([], variables) == 1
    assert probe.main([], {**variables, "ADAPTERD_SSL_CA_CERTS": pair["ADAPTERD_SSL_CERTFILE"]}) == 0


def test_a_certificate_that_is_not_there(pair: dict[str, str], tmp_path: Path) -> None:
    gone = {**pair, "ADAPTERD_SSL_CERTFILE": str(tmp_path / "gone"), "ADAPTERD_SSL_CA_CERTS": "x"}
    assert probe.main([], gone) == 1


def test_its_settings_are_the_servers() -> None:
    fields = Settings.model_fields
    text = Path(probe.__file__).read_text()
    assert {name.lower() for name in re.findall(r'"ADAPTERD_([A-Z_]+)"', text)} <= set(fields)
    assert f'"ADAPTERD_PORT", "{fields["port"].default}"' in text
    assert f'"ADAPTERD_HOST", "{fields["host"].default}"' in text
