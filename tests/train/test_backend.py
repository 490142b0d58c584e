"""Test `train.backend`: the checkpoint backend returns the heads of the network."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import runtime
from runtime.artifacts.manifest import Features
from runtime.backends import open_backend
from runtime.core.batch import Batch, Heads, collate
from runtime.core.decoding import Decoding
from runtime.core.errors import CheckpointError, DeviceError, DeviceMemoryError
from runtime.core.io.digests import sha256
from runtime.core.tokenizer import Vocabulary
from runtime.datasets.dataset import DataSet
from tests.raising import raises
from tests.runtime.number_checks import check_words_and_lengths
from tests.tolerances import HEADS
from train.backend import TorchBackend, open_checkpoint, torch_device
from train.checkpoints import Checkpoint, load_checkpoint, save_checkpoint


@pytest.fixture(scope="module")
def published(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint with the weights of the golden files."""
    path = tmp_path_factory.mktemp("published") / "drn.pt"
    config = reference.config
    weights = reference.model().state_dict()
    words = Vocabulary({f"w{i}": i for i in range(1, config.vocab_size + 1)})
    save_checkpoint(
        path, Checkpoint(config, Features(dim=config.feature_dim), words, Decoding(), weights, {"stage": 3})
    )
    return path


def as_batch(reference: Any, name: str) -> Batch:
    tokens, length, features, spans = (tensor.numpy() for tensor in reference.inputs(name))
    return Batch(tokens.astype(np.int32), length.astype(np.int32), features, spans.astype(np.float32))


def test_empty_batch_returns_empty_heads(reference: Any, published: Path) -> None:
    backend, batch = open_backend(published, device="cpu"), as_batch(reference, "a")
    none = Batch(*(values[:0] for values in vars(batch).values()))
    for actual, some in zip(vars(backend.run(none)).values(), vars(backend.run(batch)).values(), strict=True):
        assert actual.shape == (0, *some.shape[1:])
        assert actual.dtype == some.dtype


def test_numbers_out_of_range_are_rejected(reference: Any, published: Path) -> None:
    check_words_and_lengths(open_backend(published, device="cpu"), as_batch(reference, "a"))


@pytest.mark.parametrize("batch", ["a", "b", "c"])
def test_backend_heads_match_published_code(reference: Any, published: Path, batch: str) -> None:
    heads = open_backend(published, device="cpu").run(as_batch(reference, batch))
    published_heads = reference.heads(batch, reference.arrays[f"{batch}_sort_index"])
    assert isinstance(heads, Heads)
    for actual, expected in zip(vars(heads).values(), published_heads, strict=True):
        assert actual.dtype == np.float32
        assert actual.flags.c_contiguous
        np.testing.assert_allclose(actual, expected, rtol=0, atol=HEADS * np.abs(expected).max())


def test_backend_equals_the_trained_network(short_run: Path, planted: Path) -> None:
    checkpoint = load_checkpoint(short_run / "drn.pt")
    backend = runtime.open_backend(short_run / "drn.pt", device="cpu")
    data_set = DataSet(planted)
    annotations = data_set.annotations("test")[:5]
    segments = [data_set.video(a.video).segments(checkpoint.config.num_segments) for a in annotations]
    batch = collate([checkpoint.vocabulary.encode(a.sentence) for a in annotations], segments)
    with torch.no_grad():
        heads = checkpoint.model()(*(torch.from_numpy(array) for array in vars(batch).values()))
    for actual, expected in zip(vars(backend.run(batch)).values(), heads, strict=True):
        np.testing.assert_array_equal(actual, expected.numpy())
    assert backend.manifest.vocabulary == data_set.vocabulary
    assert backend.manifest.sources == {"drn.pt": sha256(short_run / "drn.pt")}
    assert backend.manifest.decoding.num_segments == checkpoint.config.num_segments == 16


def test_run_restores_training_mode_and_keeps_weights(reference: Any, published: Path) -> None:
    checkpoint = load_checkpoint(published)
    model = checkpoint.model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    backend = TorchBackend(model, checkpoint.manifest())
    first = backend.run(as_batch(reference, "a"))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.eval()
    second = backend.run(as_batch(reference, "a"))
    assert not model.training
    np.testing.assert_array_equal(first.iou_logits, second.iou_logits)


def test_open_checkpoint_sets_thread_count(published: Path) -> None:
    before = torch.get_num_threads()
    try:
        open_checkpoint(published, "cpu", threads=1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_open_backend_rejects_file_that_is_not_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(b"no")
    with raises(CheckpointError, "not_a_torch_file", tmp_path / "x.pt"):
        open_backend(tmp_path / "x.pt")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_missing_gpu_raises_error_without_fallback(published: Path) -> None:
    with raises(DeviceError, "gpu_unavailable", "cuda", torch.__version__):
        open_backend(published, device="cuda")
    assert torch_device("auto") == torch.device("cpu")


def test_unknown_device_is_rejected() -> None:
    for name in ("gpu", "tpu:0", "", "mps"):
        with raises(DeviceError, "unknown_device", repr(name)):
            torch_device(name)


def test_decoding_after_stage_1_ignores_iou_scores(short_run: Path) -> None:
    stages = [load_checkpoint(short_run / f"stage{number}" / "best.pt") for number in (1, 2, 3)]
    assert [stage.decoding.use_iou_scores for stage in stages] == [False, True, True]
    assert [stage.manifest().stage for stage in stages] == [1, 2, 3]
    assert dataclasses.replace(stages[0].decoding, use_iou_scores=True) == stages[2].decoding


def test_out_of_memory_is_device_memory_error(reference: Any, published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = open_checkpoint(published, device="cpu")
    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ):
        monkeypatch.setattr(backend.model, "forward", mock.Mock(side_effect=error))
        with raises(DeviceMemoryError, "out_of_memory", "cpu", 4):
            backend.run(as_batch(reference, "a"))
        assert not backend.model.training
    other = RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(backend.model, "forward", mock.Mock(side_effect=other))
    with pytest.raises(RuntimeError) as caught:
        backend.run(as_batch(reference, "a"))
    assert caught.value is other


def test_fp32_convolutions_do_not_use_tf32(reference: Any, published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = open_checkpoint(published, device="cpu")
    forward, seen = backend.model.forward, []

    def watched(*arguments: Any) -> Any:
        seen.append(torch.backends.cudnn.allow_tf32)
        return forward(*arguments)

    monkeypatch.setattr(backend.model, "forward", watched)
    before = torch.backends.cudnn.allow_tf32
    backend.run(as_batch(reference, "a"))
    assert seen == [False]
    assert torch.backends.cudnn.allow_tf32 == before
