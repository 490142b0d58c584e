"""Only files inside the directory of `--media` are listed and served, whatever links it contains."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.core.io.input_files import open_inside
from tests.runtime.service.conftest import Running

SECRET = b"a file that nobody may see"


def test_file_and_link_within_the_directory_open(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "real.mp4").write_bytes(b"film")
    (tmp_path / "a.mp4").symlink_to("sub/real.mp4")
    (tmp_path / "link").symlink_to(tmp_path)
    for path in (tmp_path / "a.mp4", tmp_path / "link" / "a.mp4"):
        handle = open_inside(path, path.parent)
        assert os.read(handle, 10) == b"film"
        os.close(handle)


@pytest.mark.parametrize("target", ["../secret", "/etc/passwd", "..", "missing", "loop.mp4", "../media/../secret"])
def test_link_out_of_the_directory_is_not_opened(tmp_path: Path, target: str) -> None:
    (tmp_path / "secret").write_bytes(SECRET)
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "loop.mp4").symlink_to(target)
    with pytest.raises(OSError):  # noqa: PT011 - which one depends on the target
        open_inside(tmp_path / "media" / "loop.mp4", tmp_path / "media")


def test_special_files_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "directory.mp4").mkdir()
    for name in ("pipe.mp4", "directory.mp4"):
        with pytest.raises(FileNotFoundError):
            open_inside(tmp_path / name, tmp_path)


def test_file_swapped_for_link_while_opening_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").write_bytes(SECRET)
    media = tmp_path / "media"
    media.mkdir()
    (media / "a.mp4").write_bytes(b"film")
    opened = os.open

    def swapped(path: Path, *how: int) -> int:
        (media / "a.mp4").unlink()
        (media / "a.mp4").symlink_to(tmp_path / "secret")
        return opened(tmp_path / "secret", *how)

    monkeypatch.setattr(os, "open", swapped)
    with pytest.raises(OSError):  # noqa: PT011
        open_inside(media / "a.mp4", media)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of a video file of 8 s, three files that are no videos, and two links."""
    films = pytest.importorskip("tests.films")
    media = tmp_path_factory.mktemp("recorded") / "media"
    films.film(media / "SIM00001.mp4", 80, rate=10)
    (media.parent / "secret.mp4").write_bytes(SECRET)
    (media / "SIM00000.mp4").write_bytes(b"film of one")
    (media / "SIM00002.webm").symlink_to("SIM00000.mp4")
    (media / "SIM00003.mp4").write_bytes(b"film of three")
    (media / "SIM00004.mp4").symlink_to("../secret.mp4")
    return media


@pytest.fixture(scope="module")
def recorded(start: Callable[..., Running], model: Path, planted: Path, media: Path) -> Running:
    return start("--model", model, "--data", planted, "--media", media, "--uploads", media.parent / "uploads")


def test_service_does_not_serve_files_outside_media_dir(recorded: Running, media: Path) -> None:
    listed = {video["id"]: video["media"] for video in recorded.get("/v1/videos").json["videos"]}
    assert [bool(listed[f"SIM0000{number}"]) for number in range(6)] == [True, True, True, True, False, False]
    assert recorded.get("/v1/videos/SIM00000/media").body == b"film of one"
    part = recorded.get(listed["SIM00002"], range="bytes=2-4")
    assert (part.status, part.body, part.headers["content-range"]) == (206, b"lm ", "bytes 2-4/11")
    assert part.headers["content-type"] == "video/webm"
    assert recorded.request("HEAD", "/v1/videos/SIM00000/media").status in (200, 405)
    recorded.get("/v1/videos/SIM00004/media").refused(404)
    (media / "SIM00003.mp4").unlink()
    (media / "SIM00003.mp4").symlink_to("../secret.mp4")
    recorded.get("/v1/videos/SIM00003/media").refused(404)
    for name in ("..%2fsecret", "%2e%2e%2fsecret.mp4", "..", "%2fetc%2fpasswd", "..%5csecret"):
        reply = recorded.get(f"/v1/videos/{name}/media")
        assert reply.status == 404
        assert SECRET not in reply.body
    # All file descriptors are closed.
    links = [os.readlink(link) for link in Path(f"/proc/{recorded.process.pid}/fd").iterdir() if link.exists()]
    assert not [link for link in links if str(media) in link]


def test_error_messages_are_bounded_for_any_request(service: Running) -> None:
    long = "x y" * 20_000
    for body in (
        {long: 1}, {"video": long, "query": "a"}, {"video": "SIM00000", "query": long},
        {"video": "SIM00000", "query": ["a"] * 5_000}, {"video": "SIM00000", "query": "a", "top_k": long},
        {"video": "SIM00000", "query": "a", "top_k": int("9" * 4000)},
    ):  # fmt: skip
        message = service.ask(body).refused(422)
        assert len(message) < 1500
    for parts in (
        {"features": ("n" * 3000, b"x"), "duration": "1"},
        {"n" * 3000: "1"},
        {"features": ("a.npy", b"x"), "duration": "9" * 5000},
        {"features": ("a.npy", b"x"), "duration": "1", "name": long[:8000]},
        {"other": ("a.npy", b"x")},
    ):
        reply = service.send(**parts)
        assert 400 <= reply.status < 500
        assert len(reply.json["error"]["message"]) < 1500
    assert len(service.get("/v1/videos/" + "v" * 9000).refused(404)) < 1500


def test_clip_has_the_frames_of_its_span(recorded: Running, tmp_path: Path) -> None:
    from runtime.media.video_file import frames_at, probe

    assert recorded.get("/v1/model").json["writes_clips"] is True
    reply = recorded.get("/v1/videos/SIM00001/clip?start=2&end=4.5")
    assert (reply.status, reply.headers["content-type"]) == (200, "video/mp4")
    (tmp_path / "clip.mp4").write_bytes(reply.body)
    clip = probe(tmp_path / "clip.mp4")
    assert clip.duration == pytest.approx(2.5, abs=0.01)
    # The top right of frame n of `scene` has the brightness 7 n.
    (frame,) = frames_at(clip, [0.0], 48, partial=False)
    assert frame[6:18, 40:56].mean() == pytest.approx(20 * 7, abs=6)


def test_invalid_clip_requests_are_rejected(recorded: Running, choosy: Running) -> None:
    recorded.get("/v1/videos/SIM00001/clip?start=2&end=2").refused(422, 2, "120 s")
    recorded.get("/v1/videos/SIM00001/clip?start=0&end=121").refused(422, 121, "120 s")
    recorded.get("/v1/videos/SIM00001/clip?start=0").refused(422, "end")
    recorded.get("/v1/videos/SIM00005/clip?start=0&end=1").refused(404, "SIM00005", code="no_media")
    message = recorded.get("/v1/videos/SIM00000/clip?start=0&end=1").refused(422, code="no_clip")
    assert "/" not in message
    # A service without video files writes no clips.
    assert choosy.get("/v1/model").json["writes_clips"] is False
    choosy.get("/v1/videos/SIM00001/clip?start=0&end=1").refused(404, code="no_clips")
