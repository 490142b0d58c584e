"""The commands of `docs/your-own-video.md` run as they stand, on a small C3D, a small model and made-up videos."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from export.tracing.tracer import export_model
from runtime.artifacts.extractor_manifest import FORMAT, ExtractorManifest
from runtime.core.command_list import MODULES
from runtime.core.tokenizer import Vocabulary, tokenize
from runtime.datasets.dataset import DataSet
from runtime.extract import extract
from runtime.infer import infer
from runtime.media.video_file import frames_at, probe
from tests.contract_recorder import command_function
from tests.documented import ROOT, lines_run_by
from tests.export.conftest import TINY, lively, manifest
from tests.films import film
from tests.runtime.media.extractor_graphs import write_clips
from tests.train.training.narrow import narrow_backbone
from train.extractors.c3d import C3D, MEANS, C3DConfig

__all__ = ["narrow_backbone"]

PAGE = (ROOT / "docs" / "your-own-video.md").read_text(encoding="utf-8")


def write_model(path: Path, words: Sequence[str]) -> None:
    """Write a model that knows these words, and numbers up to the size of the traced vocabulary."""
    filled = list(dict.fromkeys([*words, *map(str, range(TINY.vocab_size))]))[: TINY.vocab_size]
    vocabulary = Vocabulary({word: number for number, word in enumerate(filled, 1)})
    about = dataclasses.replace(manifest(TINY), vocabulary=vocabulary, max_query_length=40)
    onnx.save(export_model(lively(TINY), about), path)


def test_walkthrough_commands_run_unchanged(tmp_path: Path, run_command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "drn.onnx", ("person", "opens", "closes", "the", "door"))
    state = C3D(C3DConfig((4, 4, 8, 8, 8, 8, 8, 8), TINY.feature_dim), (0.0, 0.0, 0.0)).state_dict()
    renamed = {name.replace("v1a", "v1").replace("v2a", "v2"): value for name, value in state.items()}
    torch.save(renamed, tmp_path / "c3d.pickle", _use_new_zipfile_serialization=False)
    film(tmp_path / "clip.mp4", 100)
    film(tmp_path / "other.mkv", 60)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DRN_CACHE", str(tmp_path / "cache"))
    said = []
    for line in lines_run_by("tests/test_your_own_video_docs.py"):
        _, name, *words = shlex.split(line.text, comments=True)
        outcome = run_command(command_function(MODULES[name]), *words)
        said.append(outcome.out)
    assert "clip (0:04.0)" in said[2]
    assert "person opens the door" in said[2]
    data = DataSet(tmp_path / "mine")
    assert {name: len(data.video(name).features) for name in data.durations} == {"clip": 11, "other": 6}
    # The stored features give the moments of the video file.
    assert said[4].strip() in said[2]
    assert said[5].strip() == said[2].strip()
    assert (tmp_path / "moments.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in (tmp_path / "clips").iterdir()) == [
        "clip-1-person-opens-the-door.mp4",
        "clip-2-person-closes-the-door.mp4",
    ]
    wide, half = (DataSet(tmp_path / name).video("clip").features for name in ("mine", "half"))
    assert half == pytest.approx(wide, rel=0.02, abs=0.01 * float(wide.max()))


def annotations(real_data: Path, video: str) -> tuple[float, list[tuple[float, float, str]]]:
    """Return the duration of a video of ActivityNet Captions, and its moments and sentences."""
    for split in ("train", "val"):
        table = json.loads((real_data / "activitynet" / f"{split}.json").read_text(encoding="utf-8"))
        if video in table:
            entry = table[video]
            pairs = zip(entry["timestamps"], entry["sentences"], strict=True)
            return entry["duration"], [(start, end, sentence.strip()) for (start, end), sentence in pairs]
    pytest.skip(f"{video} is in no split of ActivityNet Captions that is here")


@pytest.mark.parametrize("name", ["v_GGSY1Qvo990", "univtg_charades"])
def test_walkthrough_on_real_video_gives_clips(tmp_path: Path, real_data: Path, real_videos: Path, name: str) -> None:
    """Extract features of a real video, and compare the clips of its moments, of random weights, with its frames."""
    film = real_videos / f"{name}.mp4"
    duration, known = (30.7, []) if name == "univtg_charades" else annotations(real_data, name)
    sentences = [sentence for _, _, sentence in known] or ["A person opens the door.", "The person closes it."]
    frequencies = Counter(word for sentence in sentences for word in tokenize(sentence))
    write_model(tmp_path / "drn.onnx", [word for word, _ in frequencies.most_common()])
    extractor = tmp_path / "c3d.onnx"
    write_clips(extractor, ExtractorManifest("C3D", TINY.feature_dim, 16, 8, (24, 32), (24, 24), (1.0, 2.0, 3.0)))
    data = extract((film,), extractor, tmp_path / "mine")
    assert DataSet(data).durations[name] == pytest.approx(duration, abs=0.1)
    lines = [f"{name} {start} {end}##{sentence}\n" for start, end, sentence in known]
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
    assert [bool(answer.truths) for answer in answers] == [bool(known)] * len(sentences)
    assert (tmp_path / "moments.png").read_bytes()[:4] == b"\x89PNG"
    clips = sorted((tmp_path / "clips").iterdir())
    assert len(clips) == len(sentences)
    source = probe(film)
    for answer, clip in zip(answers, clips, strict=True):
        best, made = answer.moments[0], probe(clip)
        assert made.duration == pytest.approx(best.end - best.start, abs=2 / source.frame_rate)
        (expected,), (actual,) = frames_at(source, [best.start], 240), frames_at(made, [0.0], 240)
        assert np.abs(actual.astype(int) - expected).mean() < 4


def test_documented_extractor_metadata_is_valid() -> None:
    (text,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    manifest = ExtractorManifest.from_dict(json.loads(text), "the page")
    assert (manifest.dim, manifest.resize, manifest.crop, manifest.white) == (512, 224, (224, 224), 1.0)
    assert json.loads(text)["format"] == FORMAT


def test_documented_means_match_the_code() -> None:
    for mean in MEANS.values():
        assert ", ".join(f"{value:g}" for value in mean) in PAGE
