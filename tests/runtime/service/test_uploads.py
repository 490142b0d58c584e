"""Uploads are bounded in size, never executed, and expire (modules `uploads`, `uploaded_files` and `multipart`)."""

from __future__ import annotations

import asyncio
import concurrent.futures
import errno
import io
import os
import pickle
import shutil
import signal
import struct
import time
import tracemalloc
import zipfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import Grounder, Video
from runtime.core.errors import OutputError
from runtime.core.io.atomic_files import LOCK
from runtime.core.pooling import ClipTiming
from runtime.datasets.dataset import DataSet
from runtime.service import uploads
from runtime.service.http_errors import HttpError
from runtime.service.multipart import read_form
from runtime.service.uploaded_files import display_name, read_features, sniff_container
from runtime.service.uploads import UploadOptions, Uploads, storing
from tests.array_bytes import headed, npy, npz, zipped
from tests.films import film, holed, truncated
from tests.raising import raises
from tests.runtime.service.conftest import Running, alike, form

MIB = 1 << 20
FEATURES = np.random.default_rng(0).random((40, 32), np.float32)


def read(content: bytes, path: Path, max_bytes: int = MIB) -> np.ndarray:
    path.write_bytes(content)
    return read_features(path, max_bytes, 32)


@pytest.mark.parametrize(
    "content",
    [
        npy(FEATURES),
        npy(np.asfortranarray(FEATURES)),
        npy(FEATURES.astype(">f8")),
        npz(packed=True, features=FEATURES),
        npz(arr_0=FEATURES),
        npz(features=FEATURES, spans=FEATURES[:, :2]),
    ],
)
def test_uploaded_array_is_read_in_any_numpy_format(content: bytes, tmp_path: Path) -> None:
    actual = read(content, tmp_path / "f")
    assert np.array_equal(actual, FEATURES)
    assert actual.dtype.isnative


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, ("hit",)


def torch_file(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


OBJECTS = np.array([[Bomb()] * 32], object)


@pytest.mark.parametrize(
    ("content", "status", "values"),
    [
        (b"", 415, []),
        (b"hello", 415, []),
        (pickle.dumps(Bomb()), 415, []),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), 415, []),
        (npy(OBJECTS), 422, ["object"]),
        (zipped(npy(OBJECTS)), 422, ["object"]),
        (zipped(pickle.dumps(Bomb()), "archive/data.pkl"), 415, []),
        (torch_file(Bomb()), 415, []),
        (npy(FEATURES)[:-1], 422, [5120, 5119]),
        (npy(FEATURES) + b"x", 422, [5120]),
        (npy(FEATURES[:, :31]), 422, [(40, 31)]),
        (npy(FEATURES[0]), 422, []),
        (npy(FEATURES[:0]), 422, []),
        (npy(FEATURES.astype(int)), 422, ["int64"]),
        (npy(FEATURES.astype(complex)), 422, ["complex128"]),
        (headed("(-1, 32)"), 422, []),
        (headed("(10**9, 32)"), 422, []),
        (headed("(1000000000, 32)"), 413, [128000000000]),
        (headed("(40, 32)", "'|V4'"), 422, []),
        (headed("(40, 32)", "__import__('os').mkdir('hit')"), 422, []),
        (b"\x93NUMPY\x01\x00\xff\xff" + b"[" * 65535, 422, []),
        (b"\x93NUMPY\x03\x00" + bytes(100), 422, []),
        (npz(a=FEATURES, b=FEATURES), 422, [2]),
        (npz(features=FEATURES)[:-30], 422, []),
        (zipped(npy(FEATURES), kind=zipfile.ZIP_LZMA), 422, []),
        (zipped(b"x", "readme.txt"), 422, [0]),
        (zipped(headed("(40, 32)") + bytes(5121)), 422, [5120]),
        (b"PK\x05\x06" + bytes(18), 422, [0]),
        (b"PK\x03\x04" + bytes(100), 422, []),
    ],
)
def test_invalid_feature_upload_is_rejected_without_running(
    content: bytes, status: int, values: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = {413: "too_large", 415: "unsupported_media_type", 422: "invalid"}[status]
    with raises(HttpError, code, *values) as refused:
        read(content, tmp_path / "f")
    assert refused.value.status == status
    assert not (tmp_path / "hit").exists()


# 64 MiB of zeros in 64 KiB, with a correct header and a false one.
@pytest.mark.parametrize("shape", ["(524288, 32)", "(40, 32)"])
def test_decompression_bomb_is_rejected_without_memory(shape: str, tmp_path: Path) -> None:
    content = zipped(headed(shape) + bytes(MIB), times=64)
    assert len(content) < MIB
    tracemalloc.start()
    try:
        with pytest.raises(HttpError):
            read(content, tmp_path / "f")
        assert tracemalloc.get_traced_memory()[1] < 4 * MIB
    finally:
        tracemalloc.stop()


def test_directory_over_limit_is_not_read(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("features.npy", npy(FEATURES))
        for number in range(100):
            archive.writestr(f"{number}", b"")
    with raises(HttpError, "invalid", 4096):
        read(stream.getvalue(), tmp_path / "f")
    content, size = stream.getvalue()[:-22], len(archive.filelist)
    start = archive.start_dir
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, size, size, len(content) - start, start)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, len(content), 1)
    # The last record declares a small directory, but zipfile uses the record before it.
    last = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 60, start, 0)
    with raises(HttpError, "invalid", 4096):
        read(content + record + locator + last, tmp_path / "f")


def test_sniff_container_detects_format_by_first_bytes(tmp_path: Path) -> None:
    for start, suffix in (
        (b"\0\0\0\x20ftypisom", ".mp4"),
        (b"\0\0\0\x20ftypqt  ", ".mov"),
        (b"\x1a\x45\xdf\xa3....B\x82\x84webm", ".webm"),
        (b"\x1a\x45\xdf\xa3....B\x82\x88matroska", ".mkv"),
        (b"RIFF\0\0\0\0AVI LIST", ".avi"),
    ):
        (tmp_path / "f").write_bytes(start)
        assert sniff_container(tmp_path / "f") == suffix


def test_sniff_container_rejects_playlists(tmp_path: Path) -> None:
    for start in (b"", b"#EXTM3U\nfile:///etc/passwd", b"ffconcat version 1.0\nfile /etc/passwd", b"x" * 99):
        (tmp_path / "f").write_bytes(start)
        with raises(HttpError, "unsupported_media_type", "mp4"):
            sniff_container(tmp_path / "f")


def test_display_name_is_one_short_line() -> None:
    names = {"a.b": "a.b", "../../x": "x", "C:\\films\\x": "x", "a\nb\0": "a b", "": "video", "é" * 300: "é" * 100}
    assert {name: display_name(name) for name in names} == names


def parse(body: bytes, kind: str, tmp_path: Path, step: int = 7) -> Any:
    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), step):
            yield body[start : start + step]

    return asyncio.run(read_form(kind, chunks(), lambda name: tmp_path / name, lambda size: None))


@given(st.lists(st.text(max_size=20), max_size=5), st.binary(max_size=300), st.integers(1, 50))
@settings(max_examples=60)
def test_form_is_parsed_from_chunks_of_any_size(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], content: bytes, step: int
) -> None:
    directory = tmp_path_factory.getbasetemp()
    (directory / "features").unlink(missing_ok=True)
    texts = [text.encode(errors="ignore").decode() for text in texts]
    actual = parse(*form(query=texts, features=("ä.npy", content)), directory, step)
    assert actual.fields.get("query", []) == texts
    assert actual.files["features"].name == "ä.npy"
    assert (directory / "features").read_bytes() == content


X = "multipart/form-data; boundary=x"


@pytest.mark.parametrize(
    ("body", "kind", "code", "values"),
    [
        (b"", "multipart/form-data", "bad_request", []),
        (b"", X, "bad_request", []),
        (b"hello", X, "bad_request", []),
        (form(a=1)[0][:-10], form()[1], "bad_request", []),
        (form(a="x" * 9000)[0], form()[1], "too_large", ["'a'", 8192]),
        (form(a=[1] * 200)[0], form()[1], "too_large", [128]),
        (form(a=[("x", b"1"), ("y", b"2")])[0], form()[1], "bad_request", ["'a'"]),
        (b"--x\r\nContent-Type: text/plain\r\n\r\n1\r\n--x--\r\n", X, "bad_request", []),
        (b"--x\r\n" + b"A: b\r\n" * 50 + b"\r\n1\r\n--x--\r\n", X, "bad_request", []),
        (b"", X + "x" * 299, "bad_request", []),
    ],
)
def test_malformed_form_is_rejected(body: bytes, kind: str, code: str, values: list[object], tmp_path: Path) -> None:
    with raises(HttpError, code, *values):
        parse(body, kind, tmp_path)


@pytest.fixture
def kept(tmp_path: Path) -> Any:
    return Uploads(UploadOptions(tmp_path / "uploads", total_bytes=1000, max_uploads=3, keep_s=60), ClipTiming())


def fill(kept: Uploads, size: int, age: float = 0) -> Any:
    with kept.incoming() as upload:
        kept.reserve(upload, size)
        (upload.directory / "file").write_bytes(bytes(size))
        kept.add(upload)
    upload.used -= age
    return upload


def test_oldest_uploads_are_evicted(kept: Uploads) -> None:
    first, second = fill(kept, 400, age=5), fill(kept, 400, age=9)
    third = fill(kept, 500)
    assert kept.get(second.id) is None
    assert not second.directory.exists()
    assert kept.get(first.id) is first
    assert kept.bytes == 900
    # The first upload was used just now, so it is no longer the oldest.
    fill(kept, 10)
    fill(kept, 10)
    assert len(kept) == 3
    assert (first.directory.exists(), third.directory.exists()) == (True, False)


def test_upload_over_total_limit_is_rejected_without_files(kept: Uploads, tmp_path: Path) -> None:
    fill(kept, 100)
    with raises(HttpError, "no_room"):
        fill(kept, 1001)
    assert (len(kept), kept.bytes) == (0, 0)
    (own,) = (tmp_path / "uploads").iterdir()
    assert [path.name for path in own.iterdir()] == [LOCK]


def test_unused_uploads_expire(kept: Uploads) -> None:
    old, new = fill(kept, 10, age=61), fill(kept, 10, age=59)
    kept.sweep()
    assert (kept.get(old.id), kept.get(new.id)) == (None, new)
    assert not old.directory.exists()


def test_upload_removed_while_reading_is_unknown_video(kept: Uploads, tmp_path: Path) -> None:
    upload = fill(kept, 10)
    upload.features = upload.directory / "features.npy"
    np.save(upload.features, FEATURES)
    upload.duration, upload.num_frames = 12.5, 328
    assert upload.load().duration == 12.5
    kept.remove(upload)
    with raises(HttpError, "unknown_video", repr(upload.id)) as refused:
        upload.load()
    assert refused.value.status == 404
    assert str(tmp_path) not in refused.value.message


def test_service_start_removes_uploads_of_killed_service(tmp_path: Path) -> None:
    options = UploadOptions(tmp_path)
    running = Uploads(options, ClipTiming())
    fill(running, 10)
    left = tmp_path / "service-0000"
    left.mkdir()
    (left / "in-use").touch()
    (left / "video.mp4").write_bytes(b"x")
    another = Uploads(options, ClipTiming())
    assert not left.exists()
    assert len(list(tmp_path.glob("service-*/upload-*"))) == 1
    running.close()
    another.close()
    assert list(tmp_path.iterdir()) == []


def test_removed_directory_is_recreated_and_a_file_is_rejected(kept: Uploads, tmp_path: Path) -> None:
    shutil.rmtree(kept._own)
    with kept.incoming() as upload:
        assert upload.directory.is_dir()
    shutil.rmtree(kept._own)
    kept._own.write_bytes(b"")
    with raises(HttpError, "no_room") as caught, kept.incoming():
        pass
    assert caught.value.status == 503
    with raises(OutputError, "unwritable_output", kept._own, "--uploads"):
        Uploads(UploadOptions(kept._own), ClipTiming())


def test_storing_full_disk_is_refused_and_timeout_passes() -> None:
    with raises(HttpError, "no_room"), storing():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(TimeoutError), storing():
        raise TimeoutError


def test_uploaded_features_give_same_moments_as_file(service: Running, offline: Grounder, uploads: Path) -> None:
    before = sorted(uploads.glob("service-*/upload-*"))
    video = Video(FEATURES, 330, 12.5, "mine")
    queries = ["person opens the door", "person closes the door"]
    expected = [
        {"query": query, "video": "mine", "moments": [vars(moment) for moment in offline.ground(video, query, top_k=2)]}
        for query in queries
    ]
    sent = service.send(
        "/v1/ground", features=("mine.npy", npy(FEATURES)), duration=12.5, num_frames=330, query=queries, top_k=2
    )
    assert sent.status == 200, sent.body
    assert alike(sent.json, expected)
    assert sorted(uploads.glob("service-*/upload-*")) == before


def test_upload_can_be_queried_by_id_until_deleted(service: Running, offline: Grounder) -> None:
    sent = service.send(features=("x.npz", npz(features=FEATURES)), duration=12.5, name="the kitchen")
    assert sent.status == 201, sent.body
    assert sent.json == {
        "id": sent.json["id"],
        "name": "the kitchen",
        "duration": 12.5,
        "num_frames": 328,
        "media": None,
        "state": "ready",
        "problem": None,
    }
    identity = sent.json["id"]
    assert service.get(f"/v1/videos/{identity}").json == sent.json
    assert identity not in service.get("/v1/videos").body.decode()
    moments = offline.ground(Video(FEATURES, 328, 12.5), "person opens the door")
    for _ in range(2):
        actual = service.ask({"video": identity, "query": "person opens the door"}).json
        assert alike(actual[0]["moments"], [vars(moment) for moment in moments])
    assert service.request("DELETE", f"/v1/videos/{identity}").status == 204
    service.ask({"video": identity, "query": "person opens the door"}).refused(
        404, repr(identity), code="unknown_video"
    )
    service.request("DELETE", f"/v1/videos/{identity}").refused(404)
    service.request("DELETE", "/v1/videos/SIM00001").refused(403, "'SIM00001'", code="forbidden")


WRONG = np.where(np.arange(1280).reshape(40, 32) == 70, np.nan, FEATURES)
WHOLE = {"features": ("x", npy(FEATURES))}


@pytest.mark.parametrize(
    ("parts", "status", "values"),
    [
        ({"duration": 5}, 422, [0]),
        (WHOLE, 422, ["duration"]),
        ({**WHOLE, "duration": "long"}, 422, ["duration"]),
        ({**WHOLE, "duration": "nan"}, 422, ["duration"]),
        ({**WHOLE, "duration": -1}, 422, ["duration", 0]),
        ({**WHOLE, "duration": "1e300"}, 422, ["duration"]),
        ({**WHOLE, "duration": 5, "num_frames": 1}, 422, ["num_frames"]),
        ({**WHOLE, "duration": 5, "num_frames": 10**12}, 422, ["frames"]),
        ({**WHOLE, "duration": [5, 6]}, 422, ["duration"]),
        ({**WHOLE, "duration": 5, "colour": "red"}, 422, ["colour"]),
        ({"features": ("x", npy(WRONG)), "duration": 5}, 422, [1, "clip 2"]),
        ({"features": ("x", npy(FEATURES * 1e20)), "duration": 5}, 422, []),
        ({**WHOLE, "duration": 50, "num_frames": 1312}, 422, [40, 1312, "num_frames"]),
        ({**WHOLE, "duration": 3, "num_frames": 88}, 422, [40, 88]),
        ({**WHOLE, "duration": 12500}, 422, [12500]),
        ({"features": ("x", npy(0 * FEATURES)), "duration": 12.5}, 422, [0, 40]),
        ({**WHOLE, "video": ("y", b"x"), "duration": 5}, 422, [2]),
        ({"file": ("x", npy(FEATURES))}, 422, ["'file'"]),
        ({"../../features": ("x", npy(FEATURES))}, 422, []),
        ({"video": ("x.mp4", b"#EXTM3U\n")}, 415, ["mp4"]),
        ({"video": ("x.mp4", b"\0\0\0\x20ftypisom"), "duration": 5}, 422, ["duration"]),
    ],
)
def test_unusable_upload_is_rejected_with_reason(
    service: Running, uploads: Path, parts: dict[str, Any], status: int, values: list[object]
) -> None:
    # Tests share a service, and some leave an upload.
    before = sorted(uploads.glob("service-*/upload-*"))
    service.send(**parts).refused(status, *values)
    assert sorted(uploads.glob("service-*/upload-*")) == before


def test_body_above_the_limit_is_rejected(start: Callable[..., Running], model: Path, tmp_path: Path) -> None:
    small = start("--model", model, "--uploads", tmp_path, "--upload-mib", 1, "--uploads-mib", 1)
    many = np.zeros((9000, 32), np.float32)
    small.send(features=("x", npy(many)), duration=5).refused(413, 1048576, code="too_large")
    small.ask(b" " * (300 << 10)).refused(413, 262144, code="too_large")
    small.send(video=("x.mp4", b"\0\0\0\x20ftypisom")).refused(422, "--extractor")
    small.ask({"video": "SIM00001", "query": "person opens the door"}).refused(404, "'SIM00001'", code="unknown_video")
    code, log = small.end()
    assert code == 0
    assert "Traceback" not in log
    assert list(tmp_path.iterdir()) == []


def test_uploaded_video_is_extracted_served_and_grounded(service: Running, tmp_path: Path) -> None:
    path = film(tmp_path / "my film.mp4", 80)
    sent = service.send(video=(path.name, path.read_bytes()))
    assert sent.status == 201, sent.body
    identity = sent.json["id"]
    assert sent.json["state"] == "extracting"
    # A query right after the upload waits for the features.
    actual = service.ask({"video": identity, "query": "person opens the door"})
    assert actual.status == 200, actual.body
    about = service.get(f"/v1/videos/{identity}").json
    assert (about["name"], about["state"], about["num_frames"]) == ("my film", "ready", 80)
    assert about["duration"] == pytest.approx(3.2)
    assert max(moment["end"] for moment in actual.json[0]["moments"]) <= 3.2
    part = service.get(about["media"], Range="bytes=4-7")
    assert (part.status, part.body, part.headers["content-type"]) == (206, b"ftyp", "video/mp4")
    assert service.get(about["media"]).body == path.read_bytes()
    service.get(about["media"], Range="bytes=99999999-").refused(416, code="range_not_satisfiable")
    service.get(about["media"], Range="bytes=all").refused(400, "Range")
    once = service.send("/v1/ground", video=(path.name, path.read_bytes()), query="person opens the door")
    assert once.status == 200, once.body
    assert alike(once.json[0]["moments"], actual.json[0]["moments"])


def test_uploaded_late_start_video_gives_times_of_players(service: Running, tmp_path: Path) -> None:
    times = [40 * number for number in range(80)]
    on_time = film(tmp_path / "a" / "hall.mkv", 80, times=times, sound=3)
    late = film(tmp_path / "b" / "hall.mkv", 80, times=[4000 + time for time in times], sound=7)
    first, second = (
        service.send("/v1/ground", video=("hall.mkv", path.read_bytes()), query="person opens the door").json
        for path in (on_time, late)
    )
    expected = [{**moment, "start": moment["start"] + 4, "end": moment["end"] + 4} for moment in first[0]["moments"]]
    assert alike(second[0]["moments"], expected)
    identity = service.send(video=("hall.mkv", late.read_bytes())).json["id"]
    actual = service.ask({"video": identity, "query": "person opens the door"}).json
    assert alike(actual[0]["moments"], expected)
    about = service.get(f"/v1/videos/{identity}").json
    assert about["duration"] == pytest.approx(7.2, abs=0.01)


def test_damaged_video_is_accepted_with_partial(service: Running, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 48, 64, 3), np.uint8)
    path = holed(film(tmp_path / "whole.mp4", noise), tmp_path / "hole.mp4", 30)
    question = {"query": "person opens the door"}
    service.send("/v1/ground", video=("hole.mp4", path.read_bytes()), **question).refused(422, "partial=true")
    sent = service.send("/v1/ground", video=("hole.mp4", path.read_bytes()), partial="true", **question)
    assert sent.status == 200, sent.body
    service.send("/v1/ground", features=("x", npy(FEATURES)), duration=5, partial="true", **question).refused(
        422, "partial"
    )


def test_late_start_video_shifts_feature_moments(
    start: Callable[..., Running], service: Running, model: Path, planted: Path, tmp_path: Path
) -> None:
    name, other = sorted(DataSet(planted).durations)[:2]
    film(tmp_path / "media" / f"{name}.mkv", 20, times=[4000 + 40 * number for number in range(20)], sound=5)
    (tmp_path / "media" / f"{other}.mp4").write_bytes(b"no film")
    running = start("--model", model, "--data", planted, "--media", tmp_path / "media", "--uploads", tmp_path / "up")
    for video, offset in ((name, 4), (other, 0)):
        question = {"video": video, "query": "person opens the door"}
        expected = [
            {**moment, "start": moment["start"] + offset, "end": moment["end"] + offset}
            for moment in service.ask(question).json[0]["moments"]
        ]
        actual = running.ask(question).json[0]["moments"]
        assert [moment["start"] for moment in actual] == pytest.approx([m["start"] for m in expected], abs=0.03)
        assert [moment["end"] for moment in actual] == pytest.approx([m["end"] for m in expected], abs=0.03)


def test_query_waiting_for_deleted_upload_gets_404(service: Running, tmp_path: Path) -> None:
    path = film(tmp_path / "film.mp4", 80)
    identity = service.send(video=(path.name, path.read_bytes())).json["id"]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(service.ask, {"video": identity, "query": "person opens the door"})
        time.sleep(0.2)
        assert service.request("DELETE", f"/v1/videos/{identity}").status == 204
        waiting.result().refused(404, identity)


def test_failed_upload_error_contains_no_server_paths(service: Running, tmp_path: Path) -> None:
    broken = truncated(film(tmp_path / "a.mkv", 80), tmp_path / "b.mkv")
    sent = service.send(video=("b.mkv", broken.read_bytes()))
    deadline = time.monotonic() + 30
    while (about := service.get(f"/v1/videos/{sent.json['id']}").json)["state"] == "extracting":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert about["state"] == "failed"
    assert "/" not in about["problem"]
    assert "The video" in about["problem"]
    service.ask({"video": sent.json["id"], "query": "person opens the door"}).refused(422, about["problem"])


@pytest.mark.parametrize(
    ("exit_code", "stderr", "status", "code"),
    [
        (-signal.SIGTERM, "", 503, "draining"),
        (-signal.SIGINT, "Traceback", 503, "draining"),
        (2, "error: /up/7/media has no frames.", 422, "invalid"),
        (-signal.SIGKILL, "", 422, "invalid"),
    ],
)
def test_stopped_extraction_does_not_blame_the_video(exit_code: int, stderr: str, status: int, code: str) -> None:
    error = uploads._extraction_error(exit_code, stderr, Path("/up/7/media"))
    assert (error.status, error.code) == (status, code)
