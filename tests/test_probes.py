"""The second port, which has series and probes and asks nobody for a key; and the command that asks it."""

import json
import os
import re
import signal
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import children
import httpx
import pytest
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from starlette.testclient import TestClient
from typer.testing import CliRunner

from server import serving
from server.api.access.gate import TAKES
from server.api.access.keys import digest_of, new_key
from server.app import create_app, create_metrics_app
from server.backbone.backbone import Backbone
from server.cli import app as commands
from server.healthcheck import trouble
from server.settings import Settings
from server.store.store import AdapterStore

OPEN = {"/metrics", "/livez", "/readyz"}

KEYS = json.dumps([{"name": "x", "sha256": digest_of(new_key()), "scopes": ["infer", "admin", "metrics"]}])


def certificate(folder: Path, file_name: str = "certificate.pem") -> Path:
    """A certificate that has signed itself, and its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "adapterd.example")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = folder / file_name
    file.write_bytes(
        made.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return file


# --- what it answers


def test_the_second_port_has_series_and_probes_and_nothing_else(bert: Backbone) -> None:
    app = create_app(Settings(api_keys=KEYS), backbone=bert, store=AdapterStore.open("memory://"))
    beside = create_metrics_app(app)
    assert set(beside.openapi()["paths"]) == OPEN
    everything = {
        (method.upper(), re.sub(r"\{[^}]*\}", "x", path))
        for path, methods in app.openapi()["paths"].items()
        for method in methods
    } | {("GET", path) for path in ("/", "/docs", "/redoc", "/openapi.json")}
    assert len(everything) > 40
    with TestClient(app), TestClient(beside) as client:
        for method, path in sorted(everything):
            status = client.request(method, path).status_code
            assert status == (200 if path in OPEN else 404), (method, path)
        for path in OPEN:
            for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
                assert client.request(method, path, content=b"x").status_code == 405
            assert client.get(f"{path}/", follow_redirects=False).status_code == 404
        assert "\nvllm:lora_requests_info{" in client.get("/metrics").text
        error = client.get("/admin/adapters").json()["error"]
        assert error["code"] == "not_found"


def test_what_is_open_beside_is_open_or_takes_the_scope_of_series_in_front() -> None:
    in_front = {route.split()[1] for needed in (None, "metrics") for route in TAKES[needed]}
    assert in_front >= OPEN


def test_the_first_port_asks_for_keys_all_the_same(bert: Backbone) -> None:
    settings = Settings(api_keys=KEYS, metrics_port=0)
    app = create_app(settings, backbone=bert, store=AdapterStore.open("memory://"))
    with TestClient(app) as client:
        assert client.get("/metrics").status_code == 401


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"metrics_host": "127.0.0.1"}, "ADAPTERD_METRICS_HOST does nothing"),
        ({"metrics_port": 8000}, "has to be another one"),
        ({"metrics_port": 65536}, "metrics_port"),
    ],
)
def test_settings_of_the_second_port_that_make_no_sense(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        Settings(**options)


def test_the_second_port_is_where_the_first_is_unless_told_otherwise() -> None:
    assert Settings(host="0.0.0.0", metrics_port=0).metrics_address == "0.0.0.0"
    assert Settings(host="0.0.0.0", metrics_port=0, metrics_host="10.0.0.1").metrics_address == "10.0.0.1"


def test_of_two_servers_that_take_the_second_port_at_once_one_is_told(
    bert: Backbone, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    app = create_app(Settings(), backbone=bert, store=AdapterStore.open("memory://"))
    monkeypatch.setattr(serving, "create_app", lambda _: app)
    monkeypatch.setattr(serving._Server, "run", lambda _: None)
    monkeypatch.setattr(serving, "_limit_arenas", lambda: None)
    monkeypatch.setattr(serving.logs, "configure", lambda *_: None)
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))
        bind = uvicorn.Config.bind_socket

        def bound(config: uvicorn.Config) -> socket.socket:
            own = bind(config)
            other.listen()
            return own

        monkeypatch.setattr(uvicorn.Config, "bind_socket", bound)
        assert serving.run(Settings(port=0, metrics_port=other.getsockname()[1])) == 1
    assert "metrics_port: Address already in use" in capsys.readouterr().err


def test_probes_need_no_certificate_and_outlive_the_drain(bert: Backbone, tmp_path: Path) -> None:
    """A real process that speaks mutual TLS and asks for keys."""
    pem = str(certificate(tmp_path))
    tls = {"ssl_certfile": pem, "ssl_ca_certs": pem}
    backbone = children.save_tiny_bert(tmp_path / "backbone")
    with children.serving(
        tmp_path, "memory://", backbone, metrics_port="0", api_keys=KEYS, shutdown_delay_seconds="20", **tls
    ) as server:
        address = server.address("Metrics and probes, without a key: ").removesuffix("/metrics")
        port = int(address.rpartition(":")[2])
        with httpx.Client(base_url=address, timeout=60) as client:
            assert {client.get(path).status_code for path in OPEN} == {200}
            assert client.post("/classify", json={}).status_code == 404
            assert trouble(Settings(port=1, metrics_port=port, **tls)) is None
            locked = httpx.URL(server.address(" at "))
            assert trouble(Settings(host=locked.host, port=locked.port, **tls)) is None
            assert server.process.pid is not None
            os.kill(server.process.pid, signal.SIGTERM)
            while client.get("/readyz").status_code == 200:
                time.sleep(0.01)
            assert client.get("/livez").status_code == 200
            assert trouble(Settings(port=1, metrics_port=port)) == "/readyz says 503"


# --- adapterd healthcheck


@contextmanager
def answering(status: int, pem: Path | None = None, *, clients: Path | None = None) -> Iterator[int]:
    """A server that says so to /readyz, over TLS with a certificate, perhaps only to those with one of `clients`.

    Yields its port.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/readyz" else 404)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        if pem is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(pem)
            if clients is not None:
                context.verify_mode = ssl.CERT_REQUIRED
                context.load_verify_locations(clients)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def test_the_health_check_speaks_as_the_server_does(tmp_path: Path) -> None:
    pem = certificate(tmp_path)
    with answering(200) as port:
        assert trouble(Settings(port=port)) is None
        assert trouble(Settings(host="0.0.0.0", port=port, insecure=True)) is None
        assert trouble(Settings(host="192.0.2.1", port=1, metrics_port=port, metrics_host="0.0.0.0")) is None
        assert "does not answer" in (trouble(Settings(port=port, ssl_certfile=str(pem))) or "")
    with answering(200, pem) as port:
        assert trouble(Settings(port=port, ssl_certfile=str(pem))) is None
        assert "does not answer" in (trouble(Settings(port=port)) or "")
    with answering(200, pem, clients=pem) as port:
        assert trouble(Settings(port=port, ssl_certfile=str(pem), ssl_ca_certs=str(pem))) is None
        assert "does not answer" in (trouble(Settings(port=port, ssl_certfile=str(pem))) or "")
    others = certificate(tmp_path, "others.pem")
    with answering(200, pem, clients=others) as port:
        refused = trouble(Settings(port=port, ssl_certfile=str(pem), ssl_ca_certs=str(others)))
        assert "set ADAPTERD_METRICS_PORT" in (refused or "")
    gone = str(tmp_path / "gone")
    assert "ssl_certfile" in (trouble(Settings(ssl_certfile=gone, ssl_ca_certs=gone)) or "")
    with answering(503) as port:
        assert trouble(Settings(port=port)) == "/readyz says 503"


def test_the_health_check_is_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(200) as port:
        monkeypatch.setenv("ADAPTERD_PORT", str(port))
        assert CliRunner().invoke(commands, ["healthcheck"]).exit_code == 0
    gone = CliRunner().invoke(commands, ["healthcheck"])
    assert gone.exit_code == 1
    assert "does not answer" in gone.output
    monkeypatch.setenv("ADAPTERD_PORT", "tcp://10.0.0.1:80")
    assert CliRunner().invoke(commands, ["healthcheck"]).exit_code == 2
