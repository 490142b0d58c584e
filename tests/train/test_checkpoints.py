"""Test `train.checkpoints`: round trips, loading without code, and errors of damaged files."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.artifacts.manifest import Features
from runtime.core.decoding import Decoding
from runtime.core.errors import CheckpointError, OutputError
from runtime.core.sliding_windows import Windows
from runtime.core.tokenizer import Vocabulary
from tests.raising import raises
from train.checkpoints import Checkpoint, check_weights, load_checkpoint, save_checkpoint
from train.network.model import DRN, DRNConfig
from train.training.trainer import fresh_model


@pytest.fixture(scope="module")
def checkpoint(tiny: DRNConfig) -> Checkpoint:
    return Checkpoint(
        config=tiny,
        features=Features("made up", tiny.feature_dim, 32, 16, "drn"),
        vocabulary=Vocabulary({f"w{i}": i for i in range(1, 21)}, "zero"),
        decoding=Decoding(score_threshold=0.1, use_iou_scores=False, protocol="drn"),
        weights=fresh_model(tiny, 3).state_dict(),
        training={"stage": 1, "recipe": "drn"},
        windows=Windows(194.42, 43.0, 14.5),
    )


@pytest.fixture
def saved(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "drn.pt", checkpoint)
    return tmp_path / "drn.pt"


def rewritten(path: Path, change: Any) -> Path:
    content = torch.load(path, weights_only=True)
    change(content)
    content.pop("digest", None)
    torch.save(content, path)
    return path


def test_checkpoint_survives_save_and_load(checkpoint: Checkpoint, saved: Path) -> None:
    loaded = load_checkpoint(saved)
    for name in ("config", "features", "vocabulary", "decoding", "training", "windows"):
        assert getattr(loaded, name) == getattr(checkpoint, name), name
    assert list(loaded.weights) == list(checkpoint.weights)
    assert all(torch.equal(loaded.weights[name], tensor) for name, tensor in checkpoint.weights.items())
    manifest = loaded.manifest(sources={"a": "b"})
    assert (manifest.stage, manifest.sources) == (1, {"a": "b"})
    for name in ("decoding", "features", "vocabulary", "windows"):
        assert getattr(manifest, name) == getattr(checkpoint, name), name
    assert dataclasses.replace(loaded, windows=None).manifest().windows is None


def test_checkpoint_file_has_documented_keys(saved: Path) -> None:
    content = torch.load(saved, weights_only=True)
    assert list(content) == ["format", "config", "vocabulary", "decoding", "weights", "training", "windows", "digest"]
    assert content["format"] == "drn-checkpoint/1"
    assert content["config"]["feature_dim"] == content["config"]["features"]["dim"] == 32
    kinds = {tensor.dtype for name, tensor in content["weights"].items() if not name.endswith("num_batches_tracked")}
    assert kinds == {torch.float32}


def test_model_copies_weights_unless_shared(saved: Path) -> None:
    checkpoint = load_checkpoint(saved)
    before, state = checkpoint.weights["prop_fc.bias"].clone(), torch.get_rng_state()
    assert checkpoint.model().state_dict().keys() == checkpoint.weights.keys()
    # Creating a model draws no random numbers.
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        checkpoint.model().prop_fc.bias += 1
        assert torch.equal(checkpoint.weights["prop_fc.bias"], before)
        checkpoint.model(copy=False).prop_fc.bias += 1
    assert torch.equal(checkpoint.weights["prop_fc.bias"], before + 1)


def test_network_of_half_precision_weights_computes_in_float32(saved: Path) -> None:
    checkpoint = load_checkpoint(saved)
    weights = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in checkpoint.weights.items()
    }
    model = dataclasses.replace(checkpoint, weights=weights).model(copy=False)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_missing_truncated_and_foreign_files_are_rejected(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    with raises(CheckpointError, "missing_file", path):
        load_checkpoint(path)
    for content, code in ((saved.read_bytes()[:-300], "damaged_file"), (b"no checkpoint", "not_a_torch_file")):
        path.write_bytes(content)
        with raises(CheckpointError, code, path):
            load_checkpoint(path)
    for value in ({}, [], torch.zeros(3), {"state_dict": {}}):
        torch.save(value, path)
        with raises(CheckpointError, "unknown_format", path, "train.convert"):
            load_checkpoint(path)
    with raises(CheckpointError, "unknown_format", saved, "'drn-checkpoint/1'", "'drn-checkpoint/2'"):
        load_checkpoint(rewritten(saved, lambda content: content.update(format="drn-checkpoint/2")))


class Trap:
    """Create a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_code_in_a_checkpoint_is_rejected_without_running(tmp_path: Path) -> None:
    path, created = tmp_path / "drn.pt", tmp_path / "created"
    content = {"format": "drn-checkpoint/1", "weights": Trap(created)}
    torch.save(content, path)
    with raises(CheckpointError, "code_in_file", path):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(content, protocol=2))
    with raises(CheckpointError, "not_a_torch_file", path):
        load_checkpoint(path)
    assert not created.exists()


PARTS = ("config", "vocabulary", "decoding", "weights", "training")


@pytest.mark.parametrize(
    ("part", "value"),
    [
        *((part, value) for part in PARTS for value in (None, 3, "absent")),
        # Decoding has defaults, and the training may be unknown.
        *((part, value) for part in PARTS[:4] for value in ({"stage": []}, {}) if (part, value) != ("decoding", {})),
        ("weights", {"prop_fc.bias": 3}),
    ],
)
def test_damaged_part_is_rejected(saved: Path, part: str, value: Any) -> None:
    def change(content: dict[str, Any]) -> None:
        content.pop(part)
        if value != "absent":
            content[part] = value

    with raises(CheckpointError, "tensor_mismatch" if (part, value) == ("weights", {}) else "damaged_file", saved):
        load_checkpoint(rewritten(saved, change))


def test_missing_extra_and_misshapen_tensors_are_named(saved: Path, tiny: DRNConfig) -> None:
    def change(content: dict[str, Any]) -> None:
        weights = content["weights"]
        del weights["qInput.1.bias"]
        weights["fcos.head.centerness.weight"] = torch.zeros(1)
        weights["prop_fc.bias"] = torch.zeros(7)

    names = ("qInput.1.bias", "fcos.head.centerness.weight", "prop_fc.bias")
    with raises(CheckpointError, "tensor_mismatch", saved, *names, (7,), (32,)):
        load_checkpoint(rewritten(saved, change))
    # Many tensors are counted.
    with raises(CheckpointError, "tensor_mismatch", "it", 116):
        check_weights({}, lambda: DRN(tiny), "it")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("backbone_net.layers.0.1.running_var", value) for value in (-1.0, float("nan"), float("inf"))),
        *(("prop_fc.weight", value) for value in (float("nan"), -float("inf"))),
    ],
)
def test_impossible_weight_is_named(saved: Path, name: str, value: float) -> None:
    rewritten(saved, lambda content: content["weights"][name].view(-1).__setitem__(3, value))
    with raises(CheckpointError, "impossible_weights", saved, name, 1):
        load_checkpoint(saved)


def test_resume_state_is_not_read_as_published_checkpoint(short_run: Path) -> None:
    path = short_run / "stage1" / "last.pt"
    with raises(CheckpointError, "training_state", path, "--resume", "best.pt"):
        load_checkpoint(path)


def test_interrupted_save_keeps_old_file(checkpoint: Checkpoint, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def interrupted(content: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(saved, checkpoint)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RuntimeError("PytorchStreamWriter failed writing file"), "unwritable_output"),
        (OSError(28, "No space left"), "disk_full"),
    ],
)
def test_full_disk_raises_output_error(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: str
) -> None:
    def full(content: Any, path: Path) -> None:
        raise error

    monkeypatch.setattr(torch, "save", full)
    with raises(OutputError, code, tmp_path / "drn.pt"):
        save_checkpoint(tmp_path / "drn.pt", checkpoint)
    assert list(tmp_path.iterdir()) == []
