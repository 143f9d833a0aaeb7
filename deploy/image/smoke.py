"""Runs inside the image, as its user, with the standard library only: `deploy/image/check` starts it.

The server starts, is healthy, classifies a text with the backbone and the adapters that the image brings, and ends when
it is told to. Its user can write to nothing but the store and folders for temporary files, and there are no compilers.
"""

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request

STORE = os.environ["ADAPTERD_STORE"]
ANYBODYS = {"/tmp", "/var/tmp", "/run/lock", STORE}
"""What anybody may write to while the root file system is not read-only, and the store."""
NOT_FILES = ("/proc", "/sys", "/dev")
START_SECONDS = 300
END_SECONDS = 60
HEALTH = ["adapterd", "healthcheck"]


def writable() -> set[str]:
    """The topmost folders and files that this user may write to."""
    found = set()
    for folder, folders, files in os.walk("/"):
        if folder in NOT_FILES:
            folders.clear()
            continue
        paths = [os.path.join(folder, name) for name in files]
        found |= {path for path in paths if not os.path.islink(path) and os.access(path, os.W_OK)}
        if os.access(folder, os.W_OK):
            found.add(folder)
            folders.clear()
    return {path for path in found if os.path.dirname(path) not in found}


def free_port() -> int:
    """One that nobody listens to: the machine's ports may be this container's as well."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def classify(port: int, adapter: str, text: str) -> object:
    """The server's answer. Raises HTTPError for any but 200."""
    body = json.dumps({"adapter": adapter, "inputs": text}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/classify", body, headers={"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def main() -> None:
    """Raises AssertionError for what is not as it should be."""
    assert os.getuid() != 0, "it runs as root"
    assert writable() <= ANYBODYS, f"it can write to {sorted(writable() - ANYBODYS)}"
    there = [name for name in ("cc", "gcc", "g++", "clang", "make") if shutil.which(name)]
    assert not there, f"it has {there}"

    port = free_port()
    environment = {**os.environ, "ADAPTERD_HOST": "127.0.0.1", "ADAPTERD_PORT": str(port)}
    began = time.monotonic()
    with subprocess.Popen(["adapterd", "serve"], env=environment) as server:
        try:
            while subprocess.run(HEALTH, env=environment, check=False, capture_output=True).returncode != 0:
                assert server.poll() is None, f"the server ended with {server.returncode}"
                assert time.monotonic() - began < START_SECONDS, "the server does not become ready"
                time.sleep(1)  # to ask takes a processor's time itself
            started = time.monotonic() - began
            answer = classify(port, "sentiment", "I love this film")
        finally:
            server.terminate()
            try:
                ended = server.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                server.kill()
                raise
    print(
        f"as {os.getuid()}:{os.getgid()}, writing to {sorted(writable())} only, ready after {started:.1f} s: {answer}"
    )
    assert "positive" in json.dumps(answer), answer
    assert ended in (0, -15), f"the server ended with {ended}"


main()
