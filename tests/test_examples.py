"""The examples run."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from runtime.datasets.dataset import DataSet
from tests.file_modules import load_module

ROOT = Path(__file__).parents[1]


def load(name: str) -> ModuleType:
    return load_module(ROOT / "examples" / f"{name}.py")


def test_ground_many_lists_every_test_video(models: Path, planted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load("ground_many").main(str(models / "drn.onnx"), str(planted), "person opens the door")
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert listed == {annotation.video for annotation in DataSet(planted).annotations("test")}


def test_example_writes_a_valid_video(tmp_path: Path) -> None:
    pytest.importorskip("av", reason="PyAV writes the film")
    video_file = pytest.importorskip("runtime.media.video_file")
    film = load("film")
    film.SECONDS = 2
    film.main(str(tmp_path / "clip.mp4"))
    video = video_file.probe(tmp_path / "clip.mp4")
    assert (video.num_frames, video.duration, video.damage) == (50, 2, "")
    dawn, noon, night = video_file.frames_at(video, [0.0, 1.0, 1.96], film.HEIGHT)
    assert dawn.mean() < noon.mean() > night.mean()


@pytest.mark.parametrize(
    ("time", "row", "column", "color"),
    [
        # Before sunrise: sky at the top, a little dusk above the hills, and the hills at a quarter of their daylight.
        (0, 0, 0, (10.5, 15, 36)),
        (0, 168, 425, (27.1, 25, 46)),
        (0, 239, 0, (9.5, 21, 13)),
        # The sun on the horizon: half of day and night, darkened to 0.925, with 0.7 of the dusk.
        (0.15 / 1.3, 168, 425, (181, 112.4, 89)),
        # At noon: sky far from the sun, the sun, its halo at a distance of 0.2, and the hills in daylight.
        (0.5, 0, 0, (90.4, 139.1, 180.4)),
        (0.5, 48, 213, (255, 226, 130)),
        (0.5, 96, 213, (129.1, 184.4, 231.1)),
        (0.5, 239, 0, (38, 84, 52)),
    ],
)
def test_film_has_the_colors_of_the_time_of_day(time: float, row: int, column: int, color: tuple[float, ...]) -> None:
    pytest.importorskip("av", reason="PyAV writes the film")
    # Fractions are cut off.
    assert load("film").picture(time)[row, column].tolist() == pytest.approx(color, abs=1.01)


def test_demo_uses_existing_commands(planted: Path) -> None:
    demo = load("demo")
    video, sentences = demo.longest_story(planted)
    annotated = {entry.sentence for entry in DataSet(planted).annotations("test") if entry.video == video}
    assert set(sentences) <= annotated
    source = (ROOT / "examples" / "demo.py").read_text()
    for name in ("train.simulate", "train", "export.to_onnx", "runtime.infer", "runtime.evaluate"):
        assert f'show("{name}"' in source
        assert importlib.util.find_spec(name) is not None
