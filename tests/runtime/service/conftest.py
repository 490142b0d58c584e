"""Start a service of a small model and data set on loopback, and send requests to it."""

from __future__ import annotations

import dataclasses
import http.client
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime.artifacts.manifest import METADATA_KEY, Features, Manifest
from runtime.core.decoding import Decoding
from runtime.core.presence import Presence
from runtime.datasets.dataset import DataSet
from runtime.grounding.grounder import Grounder
from tests.forked_commands import ForkedCommand
from tests.raising import quotes
from tests.tolerances import BATCHED_SECONDS

QUESTION = {"video": "SIM00001", "query": "person opens the door"}
KEY = "correct horse"


@dataclasses.dataclass(frozen=True)
class Reply:
    """A response."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def refused(self, status: int, *values: object, code: str | None = None) -> str:
        """Return the message of an error, which must have this status, and the code if one is given.

        The message must quote all values.
        """
        assert self.status == status, (self.status, self.body[:500])
        assert self.headers["content-type"] == "application/json"
        assert set(self.json) == {"error"}
        assert set(self.json["error"]) == {"code", "message"}
        assert code in (None, self.json["error"]["code"])
        message = self.json["error"]["message"]
        assert quotes(message, *values), (message, values)
        return message


class Running:
    """The command in another process."""

    def __init__(self, *words: object) -> None:
        self.process = ForkedCommand(["python", "-m", "runtime.serve", *map(str, words)])
        self.url = self.process.first_line()
        if not self.url:
            pytest.fail(f"the service did not start: {self.process.finish().stderr}")
        self.port = int(self.url.rsplit(":", 1)[1].strip("/"))

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Reply:
        return self.request("GET", path, headers=headers)

    def ask(self, value: Any, **headers: str) -> Reply:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        return self.request("POST", "/v1/ground", body, {"content-type": "application/json", **headers})

    def send(self, path: str = "/v1/videos", **parts: Any) -> Reply:
        """Send a form; see `form`."""
        body, kind = form(**parts)
        return self.request("POST", path, body, {"content-type": kind})

    def end(self, how: signal.Signals | None = signal.SIGTERM) -> tuple[int, str]:
        """End it, unless it was told to already, and return its exit code and log."""
        if how is not None and self.process.is_running():
            self.process.send_signal(how)
        result = self.process.finish(timeout=30)
        return result.returncode, result.stderr


def _manifest(planted: Path) -> Manifest:
    return Manifest(DataSet(planted).vocabulary, Decoding(), Features("C3D", 32), max_query_length=20)


@pytest.fixture(scope="session")
def model(write_graph: Callable[..., Path], planted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph whose moments depend on video and query, for the planted data set."""
    path = tmp_path_factory.mktemp("service") / "drn.onnx"
    return write_graph(path, {METADATA_KEY: _manifest(planted).to_json()}, dim=32)


@pytest.fixture(scope="session")
def strict(write_graph: Callable[..., Path], planted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with a no-match threshold above all scores."""
    manifest = dataclasses.replace(_manifest(planted), presence=Presence(1.0, 0.0, 1.0, 1, 1))
    path = tmp_path_factory.mktemp("strict") / "drn.onnx"
    return write_graph(path, {METADATA_KEY: manifest.to_json()}, dim=32)


@pytest.fixture(scope="session")
def offline(model: Path) -> Grounder:
    """The same model in this process."""
    return Grounder.load(model, "cpu", 1)


@pytest.fixture(scope="session")
def start() -> Iterator[Callable[..., Running]]:
    """Return a function that starts services, which end with the tests."""
    started: list[Running] = []

    def begin(*words: object) -> Running:
        started.append(Running(*words, "--port", 0, "--threads", 1))
        return started[-1]

    yield begin
    for service in started:
        if service.process.is_running():
            service.end(signal.SIGKILL)


@pytest.fixture(scope="session")
def extractor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small extractor whose features fit the model."""
    from tests.runtime.media.extractor_graphs import CLIPS, write_clips

    return write_clips(tmp_path_factory.mktemp("extractor") / "tiny.onnx", dataclasses.replace(CLIPS, dim=32))


@pytest.fixture(scope="session")
def uploads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory for uploads of `service`."""
    return tmp_path_factory.mktemp("uploads") / "uploads"


@pytest.fixture(scope="session")
def service(start: Callable[..., Running], model: Path, planted: Path, extractor: Path, uploads: Path) -> Running:
    """A service of the planted data set with an extractor."""
    return start("--model", model, "--data", planted, "--extractor", extractor, "--uploads", uploads)


@pytest.fixture(scope="session")
def choosy(
    start: Callable[..., Running], strict: Path, planted: Path, tmp_path_factory: pytest.TempPathFactory
) -> Running:
    """A service of `strict` without video files and without an extractor."""
    return start("--model", strict, "--data", planted, "--uploads", tmp_path_factory.mktemp("choosy"))


@pytest.fixture(scope="session")
def locked(
    start: Callable[..., Running], model: Path, planted: Path, tmp_path_factory: pytest.TempPathFactory
) -> Running:
    """A service with the API key `KEY` and the video file of SIM00001."""
    from tests.films import film, scene

    root = tmp_path_factory.mktemp("locked")
    film(root / "media" / "SIM00001.webm", scene(20), rate=5)
    words = ("--model", model, "--data", planted, "--media", root / "media", "--uploads", root / "uploads")
    return start(*words, "--allow-host", "films.example", "--api-key", KEY)


def form(**parts: Any) -> tuple[bytes, str]:
    """Return the body and Content-Type of a form of texts, lists of texts, and files as (name, bytes)."""
    boundary = b"------------------------7d1a"
    body = b""
    for field, value in parts.items():
        for one in value if isinstance(value, list) else [value]:
            name, content = one if isinstance(one, tuple) else (None, str(one).encode())
            file = f'; filename="{name}"'.encode() if name is not None else b""
            body += b'--%b\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n' % (
                boundary,
                field.encode(),
                file,
                content,
            )
    return body + b"--%b--\r\n" % boundary, f"multipart/form-data; boundary={boundary.decode()}"


def alike(actual: Any, expected: Any) -> bool:
    """Return whether two answers are equal except for the last digits of their numbers."""
    if isinstance(expected, float):
        return abs(actual - expected) <= BATCHED_SECONDS
    if isinstance(expected, dict):
        return set(actual) == set(expected) and all(alike(actual[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(actual) == len(expected) and all(map(alike, actual, expected))
    return bool(actual == expected)
