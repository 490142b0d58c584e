"""Test `train.checkpoints`: round trips, loading without code, and errors of damaged files."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import numpy as np
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
    )


@pytest.fixture
def saved(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "drn.pt", checkpoint)
    return tmp_path / "drn.pt"


def rewritten(path: Path, change: Any) -> Path:
    content = torch.load(path, weights_only=True)
    change(content)
    del content["digest"]
    torch.save(content, path)
    return path


def test_checkpoint_survives_save_and_load(checkpoint: Checkpoint, saved: Path) -> None:
    loaded = load_checkpoint(saved)
    for name in ("config", "features", "vocabulary", "decoding", "training"):
        assert getattr(loaded, name) == getattr(checkpoint, name), name
    assert list(loaded.weights) == list(checkpoint.weights)
    assert all(torch.equal(loaded.weights[name], tensor) for name, tensor in checkpoint.weights.items())


def test_windows_are_saved_and_reach_the_manifest(checkpoint: Checkpoint, tmp_path: Path) -> None:
    windows = Windows(194.42, 43.0, 14.5)
    save_checkpoint(tmp_path / "drn.pt", dataclasses.replace(checkpoint, windows=windows))
    loaded = load_checkpoint(tmp_path / "drn.pt")
    assert loaded.windows == loaded.manifest().windows == windows
    assert checkpoint.manifest().windows is None


def test_checkpoint_file_has_documented_keys(saved: Path) -> None:
    content = torch.load(saved, weights_only=True)
    assert list(content) == ["format", "config", "vocabulary", "decoding", "weights", "training", "digest"]
    assert content["format"] == "drn-checkpoint/1"
    assert content["config"]["feature_dim"] == content["config"]["features"]["dim"] == 32


def test_manifest_matches_the_checkpoint(checkpoint: Checkpoint) -> None:
    manifest = checkpoint.manifest(sources={"a": "b"})
    assert (manifest.stage, manifest.decoding, manifest.features) == (1, checkpoint.decoding, checkpoint.features)
    assert manifest.vocabulary == checkpoint.vocabulary
    assert manifest.sources == {"a": "b"}


def test_loaded_network_equals_the_saved_one(
    checkpoint: Checkpoint, saved: Path, tiny: DRNConfig, made_up_inputs: Any
) -> None:
    inputs = made_up_inputs(tiny, [3, 2])
    with torch.no_grad():
        one, other = fresh_model(tiny, 3).eval()(*inputs), load_checkpoint(saved).model()(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_model_copies_weights_unless_shared(saved: Path) -> None:
    checkpoint = load_checkpoint(saved)
    before = checkpoint.weights["prop_fc.bias"].clone()
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


def test_model_creation_draws_no_random_numbers(saved: Path) -> None:
    checkpoint = load_checkpoint(saved)
    before = torch.get_rng_state()
    checkpoint.model()
    assert torch.equal(torch.get_rng_state(), before)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with raises(CheckpointError, "missing_file", tmp_path / "absent.pt"):
        load_checkpoint(tmp_path / "absent.pt")


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "empty_file"),
        (b"no checkpoint", "not_a_torch_file"),
        (b"PK\x03\x04 cut short", "damaged_file"),
        (b"\x80\x02", "damaged_file"),
        (b"\x80\x02K\x01.", "not_a_torch_file"),
    ],
)
def test_file_with_other_content_is_rejected(tmp_path: Path, content: bytes, code: str) -> None:
    path = tmp_path / "drn.pt"
    path.write_bytes(content)
    with raises(CheckpointError, code, path):
        load_checkpoint(path)


@pytest.mark.parametrize("kept", [0.3, 0.9, 0.999])
def test_truncated_file_is_rejected(saved: Path, kept: float) -> None:
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(kept * len(whole))])
    with raises(CheckpointError, "damaged_file", saved):
        load_checkpoint(saved)


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_checkpoint_is_rejected_without_running(tmp_path: Path, legacy: bool) -> None:
    path, sprung = tmp_path / "drn.pt", tmp_path / "sprung"
    content = {"format": "drn-checkpoint/1", "weights": Trap(sprung)}
    if legacy:
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)
    with raises(CheckpointError, "not_a_torch_file" if legacy else "code_in_file", path):
        load_checkpoint(path)
    assert not sprung.exists()


@pytest.mark.parametrize("format_", ["drn-checkpoint/2", None])
def test_other_format_version_is_rejected_naming_both(saved: Path, format_: str | None) -> None:
    named = [] if format_ is None else [f"'{format_}'"]
    with raises(CheckpointError, "unknown_format", saved, "'drn-checkpoint/1'", *named):
        load_checkpoint(rewritten(saved, lambda content: content.update(format=format_)))


@pytest.mark.parametrize("content", [{}, [], torch.zeros(3), {"state_dict": {}}])
def test_foreign_torch_file_is_rejected(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "x.pt")
    with raises(CheckpointError, "unknown_format", tmp_path / "x.pt", "train.convert"):
        load_checkpoint(tmp_path / "x.pt")


PARTS = ("config", "vocabulary", "decoding", "weights", "training")


@pytest.mark.parametrize(
    ("part", "value"),
    [
        *((part, value) for part in PARTS for value in (None, 3, "absent")),
        # Decoding has defaults, and how a network came to be may be unknown.
        *((part, value) for part in PARTS[:4] for value in ({"stage": []}, {}) if (part, value) != ("decoding", {})),
    ],
)
def test_damaged_part_is_rejected(saved: Path, part: str, value: Any) -> None:
    def change(content: dict[str, Any]) -> None:
        content.pop(part)
        if value != "absent":
            content[part] = value

    with raises(CheckpointError, "tensor_mismatch" if (part, value) == ("weights", {}) else "damaged_file", saved):
        load_checkpoint(rewritten(saved, change))


def test_missing_extra_and_misshapen_tensors_are_named(saved: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        weights = content["weights"]
        del weights["qInput.1.bias"]
        weights["fcos.head.centerness.weight"] = torch.zeros(1)
        weights["prop_fc.bias"] = torch.zeros(7)

    names = ("qInput.1.bias", "fcos.head.centerness.weight", "prop_fc.bias")
    with raises(CheckpointError, "tensor_mismatch", saved, *names, (7,), (32,)):
        load_checkpoint(rewritten(saved, change))


def test_weight_that_is_not_a_tensor_is_rejected(saved: Path) -> None:
    with raises(CheckpointError, "damaged_file", saved):
        load_checkpoint(rewritten(saved, lambda content: content["weights"].update({"prop_fc.bias": 3})))


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_impossible_batch_norm_is_named(saved: Path, value: float) -> None:
    name = next(
        name for name in torch.load(saved, weights_only=True)["weights"] if name.endswith("running_var")
    )  # fmt: skip
    rewritten(saved, lambda content: content["weights"][name].__setitem__(3, value))
    with raises(CheckpointError, "impossible_weights", saved, name, 1):
        load_checkpoint(saved)


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_weight_that_is_not_finite_is_named(saved: Path, value: float) -> None:
    rewritten(saved, lambda content: content["weights"]["prop_fc.weight"].view(-1).__setitem__(0, value))
    with raises(CheckpointError, "impossible_weights", saved, "prop_fc.weight", 1):
        load_checkpoint(saved)


def test_many_wrong_tensors_are_counted_not_listed(tiny: DRNConfig) -> None:
    with raises(CheckpointError, "tensor_mismatch", "it", 116):
        check_weights({}, lambda: DRN(tiny), "it")


def test_resume_state_is_not_read_as_published_checkpoint(short_run: Path) -> None:
    path = short_run / "stage1" / "last.pt"
    with raises(CheckpointError, "training_state", path, "--resume", "best.pt"):
        load_checkpoint(path)


def test_interrupted_save_keeps_previous_file(
    checkpoint: Checkpoint, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_weights_on_file_are_plain_float32(saved: Path) -> None:
    weights = torch.load(saved, weights_only=True)["weights"]
    kinds = {str(tensor.dtype) for name, tensor in weights.items() if not name.endswith("num_batches_tracked")}
    assert kinds == {"torch.float32"}
    assert all(np.isfinite(tensor.numpy()).all() for tensor in weights.values())
