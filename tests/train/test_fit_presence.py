"""Test `train.fit_presence`: a threshold fitted on held-out videos, in every file of the model."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtime.artifacts.manifest import Manifest
from runtime.core.batch import collate
from runtime.core.decoding import score_proposals
from runtime.core.errors import CheckpointError, GroundingError
from runtime.datasets.dataset import DataSet
from runtime.grounding.grounder import Grounder
from tests.raising import quotes, raises, records
from train import fit_presence as module
from train.backend import open_checkpoint
from train.checkpoints import load_checkpoint, save_checkpoint
from train.fit_presence import fit_presence
from train.training.dataset import split_by_video


@pytest.fixture(scope="module")
def trained(short_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save the short run's checkpoint without a score threshold, because few of its scores exceed the published one."""
    path = tmp_path_factory.mktemp("trained") / "drn.pt"
    loaded = load_checkpoint(short_run / "drn.pt")
    save_checkpoint(path, dataclasses.replace(loaded, decoding=dataclasses.replace(loaded.decoding, score_threshold=0)))
    return path


@pytest.fixture(scope="module")
def fitted(trained: Path, planted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fitted") / "drn.pt"
    fit_presence(trained, planted, path, mismatched=1, device="cpu")
    return path


def test_presence_shares_are_measured_on_held_out_videos(fitted: Path, planted: Path) -> None:
    loaded, data_set = load_checkpoint(fitted), DataSet(planted)
    assert loaded.training["held_out"] == 0.1
    _, held_out = split_by_video(data_set.annotations("train", invalid="drop"), 0.1, loaded.training["seed"])
    names = sorted({annotation.video for annotation in held_out})
    assert len(names) == 2, "each sentence is paired with both videos"
    grounder = Grounder(open_checkpoint(fitted, "cpu"))

    def score(sentence: str, name: str) -> float:
        batch = collate([grounder.encode_query(sentence)], [grounder.segments(data_set.video(name))])
        return float(score_proposals(grounder.backend.run(batch), loaded.decoding).scores.max())

    scores = np.array([[score(a.sentence, name) for name in names] for a in held_out])
    own = np.array([names.index(annotation.video) for annotation in held_out])
    matching, mismatched = scores[np.arange(len(own)), own], scores[np.arange(len(own)), 1 - own]
    presence = loaded.presence
    assert presence is not None
    assert (presence.matching, presence.mismatched) == (len(own), len(own))
    assert presence.kept == pytest.approx((matching >= presence.threshold).mean())
    assert presence.refused == pytest.approx((mismatched < presence.threshold).mean())


def test_fit_presence_changes_only_the_threshold(fitted: Path, trained: Path) -> None:
    before, after = load_checkpoint(trained), load_checkpoint(fitted)
    manifest = Manifest.from_json(after.manifest(8).to_json())
    assert (manifest.presence, manifest.windows) == (after.presence, after.windows)
    assert before.presence is None
    for name in ("config", "features", "vocabulary", "decoding", "training", "windows"):
        assert getattr(before, name) == getattr(after, name), name
    assert all(torch.equal(tensor, after.weights[name]) for name, tensor in before.weights.items())


def test_fit_presence_keeps_at_least_requested_share(trained: Path, planted: Path, tmp_path: Path) -> None:
    actual = fit_presence(trained, planted, tmp_path / "drn.pt", keep=0.95, mismatched=1, device="cpu")
    assert actual.kept >= 0.95
    assert actual.rule == "at least 95 % kept"


def test_checkpoint_without_held_out_videos_requires_option(
    trained: Path, planted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load_checkpoint(trained)
    bare = tmp_path / "bare.pt"
    save_checkpoint(bare, dataclasses.replace(loaded, training={"stage": 3}))
    with raises(CheckpointError, "unknown_held_out", bare, "--held-out"):
        fit_presence(bare, planted, tmp_path / "drn.pt", device="cpu")
    assert not (tmp_path / "drn.pt").exists()
    fit_presence(bare, planted, tmp_path / "drn.pt", held_out=0.2, mismatched=1, device="cpu")
    assert records(caplog, logging.WARNING, code="unknown_held_out")


def test_threshold_is_fitted_on_val_split_by_default(
    trained: Path, planted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(planted, tmp_path / "data", ignore=shutil.ignore_patterns("cache"))
    data_set = DataSet(tmp_path / "data")
    data_set.annotations_path("test").rename(data_set.annotations_path("val"))
    caplog.set_level("INFO", "drn")
    actual = fit_presence(trained, data_set.root, tmp_path / "drn.pt", mismatched=1, device="cpu")
    assert actual.matching == len(data_set.annotations("val", invalid="drop"))
    assert records(caplog, logging.INFO, "val")
    held_out = fit_presence(trained, data_set.root, tmp_path / "drn.pt", held_out=0.1, mismatched=1, device="cpu")
    seed = load_checkpoint(trained).training["seed"]
    assert held_out.matching == len(split_by_video(data_set.annotations("train", invalid="drop"), 0.1, seed)[1])
    assert records(caplog, logging.INFO, held_out.matching)


def test_data_set_other_than_training_data_is_rejected(trained: Path, planted: Path, tmp_path: Path) -> None:
    shutil.copytree(planted, tmp_path / "data", ignore=shutil.ignore_patterns("cache"))
    path = DataSet(tmp_path / "data").annotations_path("train")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with raises(CheckpointError, "data_mismatch", tmp_path / "data", trained):
        fit_presence(trained, tmp_path / "data", tmp_path / "drn.pt", device="cpu")


@pytest.mark.parametrize(
    ("options", "code", "values"),
    [
        ({"mismatched": 0}, "invalid_option", ("--mismatched", 0)),
        ({"mismatched": 50}, "too_few_videos", ("--mismatched", 50)),
        ({"held_out": 1.0}, "invalid_option", ("--held-out", 1.0)),
        ({"keep": 1.2, "mismatched": 1}, "invalid_option", ("--keep", 1.2)),
        ({"seed": -1}, "invalid_option", ("--seed", -1)),
    ],
)
def test_impossible_argument_is_named(
    trained: Path, planted: Path, tmp_path: Path, options: dict[str, Any], code: str, values: tuple[object, ...]
) -> None:
    with raises(GroundingError, code, *values):
        fit_presence(trained, planted, tmp_path / "drn.pt", device="cpu", **options)
    assert not (tmp_path / "drn.pt").exists()


def test_fit_presence_prints_threshold_and_shares(
    trained: Path, planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(module, "fit_threshold", lambda *scores: module.Presence(0.25, 0.9, 0.75, 40, 80))
    fit_presence(trained, planted, tmp_path / "drn.pt", mismatched=1, device="cpu")
    assert quotes(capsys.readouterr().out, "0.250", "90.0 %", 40, "75.0 %", "simulated")
