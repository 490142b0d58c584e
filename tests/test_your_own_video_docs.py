"""The commands of `docs/your-own-video.md` run as they stand, on a small C3D, a small model and made-up videos."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from export.tracing.tracer import export_model
from runtime.artifacts.extractor_manifest import FORMAT, ExtractorManifest
from runtime.core.tokenizer import Vocabulary, tokenize
from runtime.datasets.dataset import DataSet
from runtime.extract import extract
from runtime.infer import infer
from runtime.media.video_file import frames_at, probe
from tests.documented import ROOT, lines_run_by
from tests.export.conftest import TINY, lively, manifest
from tests.films import film
from tests.forked_commands import ForkedCommand
from train.extractors.c3d import C3D, MEANS, C3DConfig

PAGE = (ROOT / "docs" / "your-own-video.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where what the page starts from stands: c3d.pickle, drn.onnx, and two videos."""
    directory = tmp_path_factory.mktemp("own")
    known = ("person", "opens", "closes", "the", "door")
    words = {word: number for number, word in enumerate((*known, *map(str, range(TINY.vocab_size - len(known)))), 1)}
    told = dataclasses.replace(manifest(TINY), vocabulary=Vocabulary(words))
    onnx.save(export_model(lively(TINY), told), directory / "drn.onnx")
    torch.manual_seed(0)
    state = C3D(C3DConfig((4, 4, 8, 8, 8, 8, 8, 8), TINY.feature_dim), (0.0, 0.0, 0.0)).state_dict()
    renamed = {name.replace("v1a", "v1").replace("v2a", "v2"): value for name, value in state.items()}
    torch.save(renamed, directory / "c3d.pickle", _use_new_zipfile_serialization=False)
    film(directory / "clip.mp4", 100)
    film(directory / "other.mkv", 60)
    return directory


def test_walkthrough_commands_run_unchanged(directory: Path) -> None:
    environment = {**os.environ, "DRN_CACHE": str(directory / "kept")}
    said = []
    for line in lines_run_by("tests/test_your_own_video_docs.py"):
        result = ForkedCommand(shlex.split(line.text, comments=True), environment, directory).finish()
        assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"
        assert "Next:" in result.stderr
        said.append(result.stdout)
    assert "clip (0:04.0)" in said[2]
    assert "person opens the door" in said[2]
    data = DataSet(directory / "mine")
    assert {name: len(data.video(name).features) for name in data.durations} == {"clip": 11, "other": 6}
    # The last command asks of the stored features what the third asked of the file.
    assert said[4].strip() in said[2]
    assert said[5].strip() == said[2].strip()
    assert (directory / "moments.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in (directory / "clips").iterdir()) == [
        "clip-1-person-opens-the-door.mp4",
        "clip-2-person-closes-the-door.mp4",
    ]
    wide, half = (DataSet(directory / name).video("clip").features for name in ("mine", "half"))
    assert half == pytest.approx(wide, rel=0.02, abs=0.01 * float(wide.max()))


def told_of(real_data: Path, video: str) -> tuple[float, list[tuple[float, float, str]]]:
    """Return the duration of a video of ActivityNet Captions, and its moments and sentences."""
    for split in ("train", "val"):
        table = json.loads((real_data / "activitynet" / f"{split}.json").read_text(encoding="utf-8"))
        if video in table:
            entry = table[video]
            pairs = zip(entry["timestamps"], entry["sentences"], strict=True)
            return entry["duration"], [(start, end, sentence.strip()) for (start, end), sentence in pairs]
    pytest.skip(f"{video} is in no split of ActivityNet Captions that is here")


@pytest.mark.parametrize("name", ["v_GGSY1Qvo990", "univtg_charades"])
def test_walkthrough_on_real_video_gives_moments_and_clips(
    directory: Path, tmp_path: Path, real_data: Path, real_videos: Path, name: str
) -> None:
    """From the film to features, answers beside the truth, a picture and clips; the moments are of made-up weights."""
    film = real_videos / f"{name}.mp4"
    duration, told = (30.7, []) if name == "univtg_charades" else told_of(real_data, name)
    sentences = [sentence for _, _, sentence in told] or ["A person opens the door.", "The person closes it."]
    words = {word: number for number, word in enumerate(sorted({w for s in sentences for w in tokenize(s)}), 1)}
    config = dataclasses.replace(TINY, vocab_size=len(words))
    about = dataclasses.replace(manifest(config), vocabulary=Vocabulary(words), max_query_length=40)
    onnx.save(export_model(lively(config), about), tmp_path / "drn.onnx")
    extractor = directory / "c3d.onnx"
    if not extractor.exists():
        pytest.skip("the walk through the page, which exports the extractor, did not run")
    data = extract((film,), extractor, tmp_path / "mine")
    assert DataSet(data).durations[name] == pytest.approx(duration, abs=0.1)
    lines = [f"{name} {start} {end}##{sentence}\n" for start, end, sentence in told]
    if lines:
        (data / "Charades_sta_test.txt").write_text("".join(lines), encoding="utf-8")
    answers = infer(
        tmp_path / "drn.onnx",
        tuple(sentences),
        data=data,
        video=name,
        footage=film,
        plot=tmp_path / "moments.png",
        cut=tmp_path / "clips",
    )
    assert [bool(answer.truths) for answer in answers] == [bool(told)] * len(sentences)
    assert (tmp_path / "moments.png").read_bytes()[:4] == b"\x89PNG"
    clips = sorted((tmp_path / "clips").iterdir())
    assert len(clips) == len(sentences)
    source = probe(film)
    for answer, clip in zip(answers, clips, strict=True):
        best, made = answer.moments[0], probe(clip)
        assert made.duration == pytest.approx(best.end - best.start, abs=2 / source.frame_rate)
        # The clip begins with what the film shows then.
        (wanted,), (found,) = frames_at(source, [best.start], 240), frames_at(made, [0.0], 240)
        assert np.abs(found.astype(int) - wanted).mean() < 4


def test_documented_extractor_metadata_is_valid() -> None:
    (text,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    found = ExtractorManifest.from_dict(json.loads(text), "the page")
    assert (found.dim, found.resize, found.crop, found.white) == (512, 224, (224, 224), 1.0)
    assert json.loads(text)["format"] == FORMAT


def test_documented_means_match_the_code() -> None:
    for mean in MEANS.values():
        assert ", ".join(f"{value:g}" for value in mean) in PAGE
