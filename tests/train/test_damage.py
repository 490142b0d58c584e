"""Test that a flipped bit in a checkpoint or training state is rejected or has no effect."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from runtime.core.errors import CheckpointError
from tests.damage import count_refused, flip
from tests.raising import raises
from tests.train.conftest import TrainTiny
from train import checkpoints
from train.backend import open_checkpoint
from train.checkpoints import content_digest, load, load_checkpoint, source_hash
from train.extractors.c3d import C3D, C3DConfig
from train.extractors.checkpoint import load_extractor, save_extractor
from train.extractors.published import ExtractorCheckpoint


@pytest.fixture
def run(short_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(short_run, tmp_path / "run"))


@pytest.mark.parametrize("name", ["drn.pt", "stage2/last.pt"])
def test_damaged_run_checkpoints_are_rejected(run: Path, name: str) -> None:
    path = run / name
    assert count_refused(path, lambda: content_digest(load(path)).encode(), CheckpointError, 20) == 20


def test_damaged_c3d_checkpoint_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "c3d.pt"
    torch.manual_seed(0)
    model = C3D(C3DConfig((2, 3, 4, 4, 5, 5, 6, 6), 8), (0.0, 0.0, 0.0))
    save_extractor(path, ExtractorCheckpoint(model.config, model.mean, model.state_dict(), {}))
    assert count_refused(path, lambda: content_digest(load_extractor(path).weights).encode(), CheckpointError, 20) == 20


def test_flipped_bit_at_end_of_file_is_rejected(run: Path) -> None:
    content = (run / "drn.pt").read_bytes()
    digits, length, directory = len(content) - 1, len(content) - 77, content.rindex(b"PK\1\2") + 16
    for position in (digits, length, directory):
        (run / "drn.pt").write_bytes(flip(content, 8 * position))
        with pytest.raises(CheckpointError):
            load_checkpoint(run / "drn.pt")


def test_checkpoint_is_hashed_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The SHA-256 that the manifest records is the one that is compared."""
    sources = source_hash(run / "drn.pt")
    for name in ("content_digest", "check_records", "source_hash"):
        monkeypatch.setattr(checkpoints, name, pytest.fail)
    assert open_checkpoint(run / "drn.pt", "cpu").manifest.sources == sources
    assert load_checkpoint(run / "drn.pt").weights
    load(run / "stage1" / "last.pt")


def test_check_hashes_checkpoint_without_reading_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "read", pytest.fail)
    checkpoints.check(run / "stage2" / "last.pt")


def test_weights_edited_by_another_tool_are_rejected(run: Path) -> None:
    content = torch.load(run / "drn.pt", weights_only=True)
    torch.save(content, run / "copied.pt")
    load_checkpoint(run / "copied.pt")
    content["weights"]["prop_fc.weight"][0] += 1
    torch.save(content, run / "edited.pt")
    for read in (load_checkpoint, checkpoints.check, lambda path: open_checkpoint(path, "cpu")):
        with raises(CheckpointError, "digest_mismatch"):
            read(run / "edited.pt")
    # Files of version 0.1 have no digest.
    assert len(content.pop("digest")) == 64
    torch.save(content, run / "old.pt")
    assert content_digest(load_checkpoint(run / "old.pt").weights) == content_digest(content["weights"])


def test_digest_mismatch_is_reported_before_nan_weights(run: Path) -> None:
    content = (run / "drn.pt").read_bytes()
    weights = torch.load(run / "drn.pt", weights_only=True)["weights"]["prop_fc.weight"].numpy()
    begin = content.index(weights.tobytes())
    (run / "drn.pt").write_bytes(content[:begin] + np.float32(np.nan).tobytes() + content[begin + 4 :])
    with raises(CheckpointError, "digest_mismatch"):
        load_checkpoint(run / "drn.pt")


@pytest.mark.parametrize("name", ["stage1/best.pt", "stage2/last.pt", "stage3/best.pt"])
def test_damaged_run_is_not_resumed_and_unchanged(train_tiny: TrainTiny, run: Path, name: str) -> None:
    content = (run / name).read_bytes()
    # In the values of a tensor, where torch does not detect it.
    (run / name).write_bytes(flip(content, 4 * len(content)))
    (run / "drn.pt").unlink()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with raises(CheckpointError, "digest_mismatch", run / name):
        train_tiny(run, resume=True)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_damaged_history_is_rejected(train_tiny: TrainTiny, run: Path) -> None:
    path = run / "history.jsonl"
    path.write_bytes(b"\xff" + path.read_bytes())
    with raises(CheckpointError, "not_utf8", path, "line 1", "0xff"):
        train_tiny(run, resume=True)


def test_digest_depends_on_names_shapes_dtypes_and_values() -> None:
    content = {"a": torch.arange(6.0), "b": [1, 2.5, None]}
    others = [
        {"c": content["a"], "b": content["b"]},
        {"a": content["a"].reshape(2, 3), "b": content["b"]},
        {"a": content["a"].to(torch.float64), "b": content["b"]},
        {"a": -content["a"], "b": content["b"]},
        {"a": content["a"], "b": [1, 2.5, 0]},
        {"a": content["a"], "b": [[1, 2.5], None]},
    ]
    digests = {content_digest(other) for other in (content, *others)}
    assert len(digests) == len(others) + 1
    assert content_digest({"a": torch.from_numpy(np.arange(6, dtype=np.float32)), "b": (1, 2.5, None)}) in digests
