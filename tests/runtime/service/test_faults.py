"""The service survives signals, replaced files and clients that disconnect."""

from __future__ import annotations

import concurrent.futures
import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.core.io.digests import sha256
from runtime.datasets.dataset import DataSet
from runtime.grounding.grounder import Grounder
from tests.films import film
from tests.runtime.service.conftest import Running, alike


@pytest.fixture(scope="module")
def questions(planted: Path, offline: Grounder) -> list[tuple[dict[str, str], Any]]:
    """Requests, and the answers of a model in this process."""
    data = DataSet(planted)
    actual = []
    for annotation in data.annotations("train")[:30]:
        video, query = data.video(annotation.video), annotation.sentence
        answer = [{"query": query, "video": video.name, "moments": [vars(one) for one in offline.ground(video, query)]}]
        actual.append(({"video": video.name, "query": query}, answer))
    return actual


def test_service_killed_under_load_restarts_correctly(
    start: Callable[..., Running], model: Path, planted: Path, tmp_path: Path, questions: list[Any]
) -> None:
    words = ("--model", model, "--data", planted, "--uploads", tmp_path)
    current = [start(*words)]
    stop, wrong, right = threading.Event(), [], [0, 0]

    def client(offset: int) -> None:
        turn = offset
        while not stop.is_set():
            question, expected = questions[turn % len(questions)]
            before = len(current)
            try:
                reply = current[-1].ask(question)
            except (OSError, EOFError, ValueError, AssertionError):
                time.sleep(0.02)
                continue
            except Exception as error:
                # http.client has several exceptions for a connection that ends early.
                if type(error).__module__ != "http.client":
                    raise
                continue
            if reply.status != 200 or not alike(reply.json, expected):
                wrong.append(reply)
            right[before - 1] += 1
            turn += 8

    with concurrent.futures.ThreadPoolExecutor(8) as clients:
        running = [clients.submit(client, offset) for offset in range(8)]
        try:
            for first in (0, 1):
                deadline = time.monotonic() + 30
                while right[first] < 60:
                    assert time.monotonic() < deadline, right
                    assert not any(task.done() for task in running)
                    time.sleep(0.01)
                if not first:
                    assert current[0].end(signal.SIGKILL)[0] == -signal.SIGKILL
                    assert list(tmp_path.glob("service-*")) != []
                    current.append(start(*words))
        finally:
            stop.set()
    for task in running:
        task.result()
    assert not wrong
    # The files of the killed service are deleted.
    assert len(list(tmp_path.glob("service-*"))) == 1
    assert current[1].end()[0] == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_service_finishes_accepted_requests_on_signal(
    start: Callable[..., Running], model: Path, extractor: Path, tmp_path: Path, how: signal.Signals
) -> None:
    ending = start("--model", model, "--extractor", extractor, "--uploads", tmp_path / "uploads")
    content = film(tmp_path / "film.mp4", 60).read_bytes()
    with concurrent.futures.ThreadPoolExecutor(1) as client:
        # The request takes about a second, most of it in another process.
        answer = client.submit(ending.send, "/v1/ground", video=("film.mp4", content), query="person opens the door")
        deadline = time.monotonic() + 20
        while not list((tmp_path / "uploads").glob("service-*/upload-*/video.mp4")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        ending.process.send_signal(how)
        reply = answer.result()
    assert reply.status == 200, reply.body
    code, log = ending.end(None)
    assert code == 0
    assert "Traceback" not in log
    assert list((tmp_path / "uploads").iterdir()) == []
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", ending.port))


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory, model: Path, planted: Path, extractor: Path) -> Path:
    """A directory of a model, its data set, and an extractor."""
    directory = tmp_path_factory.mktemp("copies")
    shutil.copy(model, directory / "drn.onnx")
    shutil.copy(extractor, directory / "tiny.onnx")
    shutil.copytree(planted, directory / "data")
    return directory


@pytest.fixture(scope="module")
def serving(start: Callable[..., Running], copies: Path) -> Running:
    """A service of `copies`."""
    words = ("--model", copies / "drn.onnx", "--data", copies / "data", "--extractor", copies / "tiny.onnx")
    return start(*words, "--uploads", copies / "uploads")


def test_replaced_model_file_keeps_service(serving: Running, copies: Path, model: Path, questions: list[Any]) -> None:
    digest = serving.get("/healthz").json["digest"]
    for replace in (lambda: (copies / "drn.onnx").write_bytes(b"no model"), (copies / "drn.onnx").unlink):
        replace()
        for question, expected in questions[:5]:
            assert alike(serving.ask(question).json, expected)
        assert serving.get("/healthz").json["digest"] == digest == sha256(model)


@pytest.mark.parametrize(
    ("number", "how"), enumerate(["rename", "in place", "rename, same time", "in place, same time", "another kind"])
)
def test_new_features_are_reloaded(serving: Running, copies: Path, offline: Grounder, number: int, how: str) -> None:
    data, name = copies / "data", f"SIM0000{number}"
    path, question = DataSet(data).feature_path(name), {"video": name, "query": "person opens the door"}
    original = DataSet(data).video(name)

    def expected() -> Any:
        moments = offline.ground(DataSet(data).video(name), question["query"])
        return [{**question, "moments": [vars(moment) for moment in moments]}]

    before = expected()
    for _ in range(2):
        assert alike(serving.ask(question).json, before)
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    if how == "another kind":
        path.unlink()
        path = path.with_suffix(".npz")
        np.savez(path, original.features[::-1])
    else:
        created = path if how.startswith("in place") else copies / "made.npy"
        np.save(created, original.features[::-1])
        created.replace(path)
    if "same time" in how:
        os.utime(path, ns=times)
    after = expected()
    assert not alike(before, after)
    for _ in range(2):
        assert alike(serving.ask(question).json, after)
    path.write_bytes(b"damaged")
    serving.ask(question).refused(404)
    path.unlink()
    message = serving.ask(question).refused(404, code="no_features")
    assert str(copies) not in message


def test_replaced_extractor_is_rejected(serving: Running, copies: Path, extractor: Path, tmp_path: Path) -> None:
    copied, video = copies / "tiny.onnx", ("film.mp4", film(tmp_path / "film.mp4", 40).read_bytes())

    def send() -> Any:
        return serving.send("/v1/ground", video=video, query="person opens the door")

    before = send()
    assert before.status == 200
    # A copy with another modification time is the same extractor.
    shutil.copy(extractor, tmp_path / "again.onnx")
    (tmp_path / "again.onnx").replace(copied)
    assert alike(send().json, before.json)
    content = bytearray(extractor.read_bytes())
    content[len(content) // 2] ^= 1
    for replace in (lambda: copied.write_bytes(content), copied.unlink):
        replace()
        send().refused(503, code="extractor_changed")
    shutil.copy(extractor, copied)
    assert alike(send().json, before.json)


def test_disconnecting_clients_do_not_affect_others(service: Running, questions: list[Any]) -> None:
    body = json.dumps(questions[0][0]).encode()
    complete = (
        b"POST /v1/ground HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    )

    def leave(length: int) -> None:
        with socket.create_connection(("127.0.0.1", service.port)) as stream:
            stream.sendall(complete[:length])
            if length % 2:
                # A reset, as from a killed process.
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    with concurrent.futures.ThreadPoolExecutor(8) as clients:
        leaving = [clients.submit(leave, length) for length in range(0, len(complete) + 1, 3)]
        replies = [clients.submit(service.ask, question) for question, _ in questions]
        for task in leaving:
            task.result()
        for task, (_, expected) in zip(replies, questions, strict=True):
            assert alike(task.result().json, expected)
    assert service.process.is_running()
