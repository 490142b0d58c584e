"""Test `train.training.batch_sources`: all sources yield equal batches, and cached stems equal computed ones."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train.training.trainer as loop
from runtime.datasets.dataset import DataSet
from tests.raising import records
from tests.tolerances import HEADS, PROCESS_WEIGHTS, PROCESSES
from tests.train.conftest import TrainTiny, shorten
from train.checkpoints import load_checkpoint
from train.history import read_history
from train.network.model import DRN, DRNConfig, Stem
from train.training import batch_sources
from train.training.batch_sources import (
    CachedStemSource,
    DeviceSource,
    HostSource,
    StemContinuation,
    Step,
    open_source,
    stems_fit,
)
from train.training.dataset import TrainingData, pool
from train.training.recipes import RECIPES, Stage

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data_set(planted: Path) -> DataSet:
    return DataSet(planted)


@pytest.fixture(scope="module", params=[False, True], ids=["features", "blind"])
def training(data_set: DataSet, tmp_path_factory: pytest.TempPathFactory, request: Any) -> TrainingData:
    annotations = data_set.annotations("train", invalid="drop")
    # In the file, queries are sorted by video.
    annotations = [annotations[index] for index in np.random.default_rng(0).permutation(len(annotations))]
    videos = sorted({annotation.video for annotation in annotations})
    pooled = pool(data_set, videos, 32, data_set.features(), tmp_path_factory.mktemp("cache"))
    return TrainingData(data_set, annotations, pooled, data_set.vocabulary, blind=request.param)


@pytest.fixture(scope="module")
def model(data_set: DataSet) -> DRN:
    torch.manual_seed(0)
    return DRN(DRNConfig(len(data_set.vocabulary), 8, 32, 16, 16))


def flat(step: Step) -> list[torch.Tensor]:
    return [*step[0], step[1]]


@pytest.mark.parametrize("negatives", [False, True])
def test_all_sources_yield_the_same_batches(training: TrainingData, negatives: bool) -> None:
    epoch = training.epoch(7, (3,))
    mismatched = training.mismatched(epoch, 5, (3,)) if negatives else None
    host = [flat(step) for step in HostSource(training, CPU).batches(epoch, mismatched)]
    assert len(host) == len(epoch) > 5
    assert [len(part) for part in host[0]] == [12 if negatives else 7] * 4 + [7]
    for source in (HostSource(training, CPU, workers=2), DeviceSource(training, CPU)):
        for expected, actual in zip(host, source.batches(epoch, mismatched), strict=True):
            for one, other in zip(expected, flat(actual), strict=True):
                assert one.dtype == other.dtype
                assert torch.equal(one, other)
    first = training.batch(epoch[0], mismatched[0] if mismatched else None)
    for expected, actual in zip((*vars(first.inputs).values(), first.truth), host[0], strict=True):
        np.testing.assert_array_equal(actual.numpy(), expected)


def test_cached_stems_equal_the_stems_of_each_batch(training: TrainingData, model: DRN) -> None:
    epoch = training.epoch(7, (3,))
    stems = CachedStemSource(training, model, CPU, None)
    for ((tokens, lengths, features, spans), truth), (stem, same) in zip(
        HostSource(training, CPU).batches(epoch), stems.batches(epoch), strict=True
    ):
        assert torch.equal(truth, same)
        with torch.no_grad():
            expected = model.stem(tokens, lengths, model.prop_fc(features), spans)
            heads = model.eval()(tokens, lengths, features, spans)
            for one, other in zip(StemContinuation(model)(*stem), heads, strict=True):
                torch.testing.assert_close(one, other, rtol=HEADS, atol=1e-6)
        for name, one, other in zip(Stem._fields, stem, expected, strict=True):
            assert not one.requires_grad
            torch.testing.assert_close(one, other, rtol=HEADS, atol=1e-6, msg=name)


def test_each_video_is_projected_once(training: TrainingData, model: DRN, monkeypatch: pytest.MonkeyPatch) -> None:
    projected = []
    model.prop_fc.register_forward_hook(lambda module, inputs, output: projected.append(len(output)))
    CachedStemSource(training, model, CPU, None)
    model.prop_fc._forward_hooks.clear()
    # A video may be at the end of one chunk and at the beginning of the next.
    chunks = -(-len(training) // batch_sources.STEM_PAIRS)
    assert len(projected) == chunks
    assert sum(projected) < len(set(training.video_rows.tolist())) + chunks < len(training)


def test_stems_beyond_memory_limit_are_not_cached_and_logged(
    training: TrainingData, model: DRN, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="drn")
    assert stems_fit(training, model, CPU)
    assert not caplog.records
    monkeypatch.setattr(batch_sources, "STEM_GIB", 1e-4)
    assert not stems_fit(training, model, CPU)
    assert records(caplog, logging.INFO, "Stage 2", len(training))


def test_only_stage_2_freezes_the_stem(model: DRN) -> None:
    assert [stage.freezes_stem for stage in RECIPES["mmaction2"].stages] == [False, True, False]
    Stage(2, 1e-5, 1).freeze(model)
    stem = ("query_encoder.", "qInput.", "prop_fc.", "position_transform.", "backbone_net.layers.0.0.")
    parts = {name: parameter for name, parameter in model.named_parameters() if name.startswith(stem)}
    assert len(parts) > 20
    assert not any(parameter.requires_grad for parameter in parts.values())
    # Batch norms would change their buffers, and mix the pairs of a batch.
    assert not [name for name, _ in model.named_buffers() if name.startswith(stem)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stage_2_with_cached_stems_gives_same_result(
    short_run: Path,
    train_tiny: TrainTiny,
    planted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: Any,
) -> None:
    options = {"epochs": (3,), "lr": (1e-4,), "load": short_run / "stage1" / "best.pt"}
    options |= {"stage": "2", "validate_on": "none", "precision": precision, "batch_size": 8}
    data = shorten(planted, tmp_path / "data", 48)
    train_tiny(tmp_path / "cached", data, **options)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "stems_fit", lambda *_: False)
        train_tiny(tmp_path / "plain", data, **options)
    cached, plain = (read_history(tmp_path / name / "history.jsonl") for name in ("cached", "plain"))
    tolerance = PROCESSES if precision == "fp32" else 0.02
    for one, other in zip(cached, plain, strict=True):
        for name in ("loss_matching", "loss_boundary", "loss_iou", "gradient_norm"):
            assert one[name] == pytest.approx(other[name], rel=tolerance), name
        assert one["steps"] == other["steps"] >= 5
    weights = [load_checkpoint(tmp_path / name / "drn.pt").weights for name in ("cached", "plain")]
    before = load_checkpoint(options["load"]).weights
    moved = {name for name in before if not torch.equal(before[name], weights[0][name])}
    assert moved == {name for name in before if not torch.equal(before[name], weights[1][name])}
    assert {"backbone_net.layers.0.1.running_mean", "fcos.head.cls_tower.1.num_batches_tracked"} < moved
    assert "fcos.head.mix_fc.0.weight" in moved
    # A bias before a batch norm has no effect, so that its gradient is rounding noise.
    noise = {"fcos.head.mix_fc.0.bias", "fcos.head.iou_scores.0.bias"}
    for name in moved - noise:
        one, other = (actual[name].double() for actual in weights)
        errors = (one - other).abs() / other.abs().max().clamp(min=1e-3)
        assert float(errors.median()) < (PROCESS_WEIGHTS if precision == "fp32" else 0.02), name


def test_resumed_stage_2_equals_uninterrupted_run(
    short_run: Path, train_tiny: TrainTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"epochs": (3,), "lr": (1e-3,), "load": short_run / "stage1" / "best.pt", "stage": "2"}
    train_tiny(tmp_path / "whole", **options)
    real, calls = loop.save, [0]

    def stop(*arguments: Any) -> None:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            train_tiny(tmp_path / "cut", **options)
    train_tiny(tmp_path / "cut", resume=True, **options)
    expected, actual = (
        torch.load(tmp_path / name / "stage2" / "last.pt", weights_only=True)["model"] for name in ("whole", "cut")
    )
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(("free", "kind"), [(1 << 40, DeviceSource), (1 << 10, HostSource)])
def test_features_stay_on_gpu_if_memory_suffices(
    training: TrainingData, monkeypatch: pytest.MonkeyPatch, free: int, kind: type, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="drn")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    monkeypatch.setattr(batch_sources.DeviceSource, "__init__", lambda self, data, device: None)
    assert type(open_source(training, torch.device("cuda"))) is kind
    assert len(records(caplog, logging.INFO, "cuda")) == (kind is HostSource)
    assert type(open_source(training, CPU)) is HostSource
