"""The examples run."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from runtime.datasets.dataset import DataSet

ROOT = Path(__file__).parents[1]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    found = video_file.probe(tmp_path / "clip.mp4")
    assert (found.num_frames, found.duration, found.damage) == (50, 2, "")
    dawn, noon, night = video_file.frames_at(found, [0.0, 1.0, 1.96], film.HEIGHT)
    assert dawn.mean() < noon.mean() > night.mean()


def test_demo_uses_existing_commands(planted: Path) -> None:
    demo = load("demo")
    video, sentences = demo.longest_story(planted)
    annotated = {entry.sentence for entry in DataSet(planted).annotations("test") if entry.video == video}
    assert set(sentences) <= annotated
    source = (ROOT / "examples" / "demo.py").read_text()
    for name in ("train.simulate", "train", "export.to_onnx", "runtime.infer", "runtime.evaluate"):
        assert f'show("{name}"' in source
        assert importlib.util.find_spec(name) is not None
