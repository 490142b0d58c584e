"""Test `train.convert`: published checkpoints convert without changes, and without running code."""

from __future__ import annotations

import json
import logging
import re
import sys
import types
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from runtime.artifacts.manifest import Features
from runtime.core.decoding import Decoding
from runtime.core.errors import CheckpointError
from runtime.core.tokenizer import Vocabulary
from tests.raising import quotes, raises, records
from train.checkpoints import Checkpoint, load_checkpoint
from train.convert import CHARADES_STA, convert, read, read_config, report
from train.network.model import DRN, DRNConfig

SMALL = DRNConfig(feature_dim=64, embed_dim=16, hidden_dim=8, fpn_dim=32)

State = dict[str, Any]


@pytest.fixture
def state() -> State:
    """Return the weights of a small network, with the published names and order."""
    torch.manual_seed(0)
    return OrderedDict(DRN(SMALL).state_dict())


@pytest.fixture
def word_table(tmp_path: Path) -> Path:
    path = tmp_path / "word2id.json"
    path.write_text(json.dumps({f"word{number}": number for number in range(1, 1302)}))
    return path


def authors_state(state: State) -> State:
    """Return the weights with the authors' names and unused parts, as saved from DataParallel."""

    def original(name: str) -> str:
        for pattern, old in (
            (r"query_encoder\.W3\.", "query_encoder.qInput."),
            (r"query_encoder\.W2\.(\d)\.", r"query_encoder.qInput\1."),
            (r"query_encoder\.W1\.", "query_encoder.cmd_inter2logits."),
            (r"backbone_net\.layers\.(\d)\.", r"backbone_net.forward_conv\1."),
            (r"qInput\.(\d)\.", r"qInput\1."),
        ):
            name = re.sub(f"^{pattern}", old, name)
        name = re.sub(r"^fpn\.inner_blocks\.(\d)", lambda match: f"fpn.fpn_inner{int(match[1]) + 1}", name)
        return re.sub(r"^fpn\.layer_blocks\.(\d)", lambda match: f"fpn.fpn_layer{int(match[1]) + 1}", name)

    renamed = OrderedDict((original(name), tensor) for name, tensor in state.items())
    renamed["query_encoder.textualAttention.att.weight"] = torch.ones(1, 3)
    renamed["fcos.head.centerness.weight"] = torch.ones(1, 32, 3)
    renamed["fcos.head.centerness.bias"] = torch.ones(1)
    return OrderedDict((f"module.{name}", tensor) for name, tensor in renamed.items())


def published(state: State, path: Path, cfg: str = "model = dict(is_first_stage=False, is_second_stage=False)") -> Path:
    meta = {"epoch": 10, "iter": 3870, "cfg": cfg, "seed": 1, "experiment_name": "drn", "dataset_meta": {}}
    torch.save({"meta": meta, "state_dict": state}, path)
    return path


def training(state: State, path: Path) -> Path:
    """Save a checkpoint as mmengine does after an epoch, with objects of classes that are not installed."""
    names = ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer")
    modules = {name: types.ModuleType(name) for name in names}

    class HistoryBuffer:
        def __init__(self) -> None:
            self._log_history = np.arange(4.0)
            self._statistics_methods = {"mean": HistoryBuffer.mean}

        def mean(self) -> float:
            return 1.0

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = names[-1], "HistoryBuffer"
    HistoryBuffer.mean.__module__, HistoryBuffer.mean.__qualname__ = names[-1], "HistoryBuffer.mean"
    modules[names[-1]].HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([parameter])
    parameter.sum().backward()
    optimizer.step()
    content = {
        "meta": {"epoch": 3, "cfg": "model = dict(is_first_stage=True, is_second_stage=False)"},
        "state_dict": state,
        "message_hub": {"log_scalars": OrderedDict(loss=HistoryBuffer()), "runtime_info": {"iter": 3}},
        "optimizer": optimizer.state_dict(),
        "param_schedulers": [{"base_values": [1e-3], "last_step": 3}],
    }
    with mock.patch.dict(sys.modules, modules):
        torch.save(content, path)
    return path


def authors(state: State, path: Path) -> Path:
    content = {"epoch": 7, "state_dict": authors_state(state), "loss": 1.5, "top1": np.float64(45.4), "top5": 0.5}
    torch.save(content, path)
    return path


FILES: dict[str, Callable[[State, Path], Path]] = {
    "published.pth": published,
    "epoch_3.pth": training,
    "model_best.pth.tar": authors,
}


def test_charades_windows_require_published_vocabulary(tmp_path: Path, state: State) -> None:
    state["query_encoder.embedding.weight"] = state["query_encoder.embedding.weight"][:-1]
    convert(published(state, tmp_path / "other.pth"), tmp_path / "other.pt")
    assert load_checkpoint(tmp_path / "other.pt").windows is None


@pytest.mark.parametrize(
    ("name", "convention", "stage"),
    [("published.pth", "mmaction2", 3), ("epoch_3.pth", "mmaction2", 1), ("model_best.pth.tar", "drn", 3)],
)
def test_converted_checkpoint_equals_the_source(
    tmp_path: Path, state: State, word_table: Path, name: str, convention: str, stage: int
) -> None:
    source = FILES[name](state, tmp_path / name)
    convert(source, tmp_path / "drn.pt", vocabulary=word_table)
    checkpoint = load_checkpoint(tmp_path / "drn.pt")
    assert checkpoint.config == SMALL
    assert (checkpoint.features.pooling, checkpoint.features.dim) == (convention, 64)
    assert checkpoint.decoding.protocol == convention
    assert checkpoint.training["stage"] == stage
    assert checkpoint.decoding.use_iou_scores == (stage > 1)
    assert checkpoint.vocabulary.words["word1301"] == 1301
    assert checkpoint.windows == CHARADES_STA
    assert set(checkpoint.weights) == set(state)
    for key, tensor in state.items():
        assert torch.equal(checkpoint.weights[key], tensor), key
        assert checkpoint.weights[key].dtype == tensor.dtype

    network = DRN(SMALL)
    network.load_state_dict(state)
    generator = torch.Generator().manual_seed(0)
    spans = torch.stack((torch.arange(32) / 32, torch.arange(1, 33) / 32), dim=1).expand(2, 32, 2)
    batch = (torch.tensor([[1, 5, 9], [7, 2, 0]]), torch.tensor([3, 2]))
    features = torch.rand(2, 32, 64, generator=generator)
    with torch.no_grad():
        heads = (model(*batch, features, spans) for model in (checkpoint.model(), network.eval()))
        assert all(torch.equal(actual, expected) for actual, expected in zip(*heads, strict=True))


def test_stage_option_overrides_detected_stage(tmp_path: Path, state: State) -> None:
    source = published(state, tmp_path / "f.pth")
    assert not convert(source, tmp_path / "drn.pt", stage=1).decoding.use_iou_scores
    second = published(state, tmp_path / "g.pth", cfg="is_first_stage=False, is_second_stage=True")
    assert convert(second, tmp_path / "drn.pt").training["stage"] == 2
    assert convert(second, tmp_path / "drn.pt", stage=3).training["stage"] == 3


@pytest.mark.parametrize("layout", ["published.pth", "model_best.pth.tar"])
def test_network_sizes_follow_tensor_shapes(tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = DRNConfig(vocab_size=7, embed_dim=4, feature_dim=8, fpn_dim=10, head_convs=3, lstm_layers=2)
    source = FILES[layout](DRN(config).state_dict(), tmp_path / layout)
    convert(source, tmp_path / "drn.pt")
    assert load_checkpoint(tmp_path / "drn.pt").config == config
    # Unused modules are dropped and reported.
    unused = (3, "fcos.head.centerness", "query_encoder.textualAttention")
    assert quotes(capsys.readouterr().out, *unused) == (layout == "model_best.pth.tar")


def test_published_size_is_recognized(tmp_path: Path, recipe: types.ModuleType, golden: Path) -> None:
    # Only shapes matter, so every tensor of the file is a view of one zero.
    shapes = recipe.load_shapes(golden / "state_dict_full.json")
    state = OrderedDict(
        (name, torch.zeros((), dtype=getattr(torch, dtype)).expand(shape)) for name, shape, dtype in shapes
    )
    path = published(state, tmp_path / "f.pth")
    actual = read(path)
    config = read_config(actual.weights, path)
    assert config == DRNConfig()
    checkpoint = Checkpoint(config, Features(), Vocabulary({}), Decoding(), state, {"stage": 3})
    printed = report(checkpoint, actual, tmp_path / "drn.pt")
    assert quotes(printed, "39,214,288", 120, "4,096")


def test_bare_half_precision_state_dict_becomes_float32(tmp_path: Path, state: State) -> None:
    half = OrderedDict((name, t.half() if t.is_floating_point() else t) for name, t in state.items())
    torch.save(half, tmp_path / "f.pth", _use_new_zipfile_serialization=False)
    checkpoint = convert(tmp_path / "f.pth", tmp_path / "drn.pt")
    assert {t.dtype for t in checkpoint.weights.values()} == {torch.float32, torch.int64}
    assert torch.equal(checkpoint.weights["prop_fc.weight"], state["prop_fc.weight"].half().float())


def test_missing_vocabulary_warns_with_command(tmp_path: Path, state: State, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="drn"):
        convert(published(state, tmp_path / "f.pth"), tmp_path / "drn.pt")
    assert records(caplog, logging.WARNING, "--vocabulary", 1301)
    assert records(caplog, logging.INFO, "python -m train.convert")
    assert len(load_checkpoint(tmp_path / "drn.pt").vocabulary) == 0


def assert_rejected(source: Path, code: str, *values: object, **options: Any) -> None:
    output = source.with_name("rejected.pt")
    with raises(CheckpointError, code, *values):
        convert(source, output, **options)
    assert not output.exists()


@pytest.mark.parametrize("name", FILES)
def test_missing_extra_and_misshapen_tensors_are_named(tmp_path: Path, state: State, name: str) -> None:
    del state["fcos.head.mix_fc.0.bias"]
    state["fcos.head.novelty.weight"] = torch.ones(2)
    state["prop_fc.weight"] = torch.ones(64, 63)
    source = FILES[name](state, tmp_path / name)
    names = ("fcos.head.mix_fc.0.bias", "fcos.head.novelty.weight", "prop_fc.weight")
    assert_rejected(source, "tensor_mismatch", source, *names, (64, 63), (64, 64))


SIZE_TENSORS = (
    "query_encoder.embedding.weight",
    "query_encoder.biLSTM.weight_hh_l0",
    "query_encoder.biLSTM.weight_ih_l0_reverse",
    "query_encoder.W3.bias",
    "backbone_net.layers.0.0.weight",
    "fpn.inner_blocks.0.0.weight",
    "fcos.head.cls_tower.0.weight",
    "prop_fc.weight",
    "prop_fc.bias",
    "qInput.0.bias",
)


@pytest.mark.parametrize("name", SIZE_TENSORS)
def test_mismatched_tensor_is_named_even_when_it_sets_sizes(tmp_path: Path, state: State, name: str) -> None:
    tensor = state.pop(name)
    # The embedding defines the number of words, so only its other side can be wrong.
    longer = torch.cat((tensor, tensor), dim=1 if name == "query_encoder.embedding.weight" else 0)
    for change in ({}, {name: longer}, {name: torch.tensor(1.0)}):
        source = published({**state, **change}, tmp_path / "f.pth")
        with raises(CheckpointError, "tensor_mismatch", source, name) as caught:
            convert(source, tmp_path / "drn.pt")
        assert set(re.findall(r"[\w.]+\.(?:weight|bias)[\w]*", str(caught.value))) == {name}


def test_many_missing_tensors_are_counted(tmp_path: Path, state: State) -> None:
    source = published(OrderedDict(list(state.items())[:100]), tmp_path / "f.pth")
    assert_rejected(source, "tensor_mismatch", source, 16)


@pytest.mark.parametrize(
    ("change", "code", "values"),
    [
        ({"prop_fc.bias": torch.full((64,), float("nan"))}, "impossible_weights", (64, "prop_fc.bias")),
        ({"prop_fc.bias": torch.ones(64, dtype=torch.int64)}, "impossible_weights", ("prop_fc.bias", "int64")),
        ({"prop_fc.bias": torch.full((64,), 1e300, dtype=torch.float64)}, "impossible_weights", ("prop_fc.bias",)),
        ({"prop_fc.bias": [1.0] * 64}, "not_a_state_dict", ("'prop_fc.bias'",)),
        ({"query_encoder.qInput.bias": torch.ones(8)}, "duplicate_tensor", ("'query_encoder.W3.bias'",)),
    ],
    ids=["nan", "integers", "overflow", "list", "twice"],
)
def test_invalid_weights_fail(
    tmp_path: Path, state: State, change: State, code: str, values: tuple[object, ...]
) -> None:
    assert_rejected(published(OrderedDict(state, **change), tmp_path / "f.pth"), code, tmp_path / "f.pth", *values)


@pytest.mark.parametrize(
    ("content", "code", "named"),
    [
        ({"state_dict": {}}, "not_a_state_dict", "state_dict"),
        ({"state_dict": 5}, "not_a_state_dict", "state_dict"),
        ([torch.ones(2)], "not_a_state_dict", "state_dict"),
        (torch.ones(3, 4096), "not_a_state_dict", "state_dict"),
        ({1: torch.ones(2)}, "not_a_state_dict", "state_dict"),
        ({"conv1.weight": torch.ones(2)}, "tensor_mismatch", "conv1.weight"),
        ({"epoch": 3, "lr": 0.1}, "not_a_state_dict", "'epoch'"),
        ({"prop_fc.bias": torch.ones(3, device="meta")}, "impossible_weights", "'prop_fc.bias'"),
        ({"prop_fc.weight": torch.ones(3, 3).to_sparse()}, "impossible_weights", "'prop_fc.weight'"),
        ({"prop_fc.bias": torch.ones(3).to(torch.float8_e4m3fn)}, "impossible_weights", "'prop_fc.bias'"),
        (
            {"prop_fc.bias": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)},
            "impossible_weights",
            "'prop_fc.bias'",
        ),
        ({"query_encoder.embedding.weight": torch.ones(1, 16)}, "tensor_mismatch", "query_encoder.embedding.weight"),
        ({"query_encoder.embedding.weight": torch.ones(0, 16)}, "tensor_mismatch", "query_encoder.embedding.weight"),
    ],
)
def test_other_torch_files_raise_specific_codes(tmp_path: Path, content: Any, code: str, named: str) -> None:
    torch.save(content, tmp_path / "f.pth")
    assert_rejected(tmp_path / "f.pth", code, tmp_path / "f.pth", named)


def test_converted_file_as_input_or_output_is_rejected(tmp_path: Path, state: State) -> None:
    source = published(state, tmp_path / "f.pth")
    convert(source, tmp_path / "drn.pt")
    assert_rejected(tmp_path / "drn.pt", "already_converted", tmp_path / "drn.pt")
    before = source.read_bytes()
    with raises(CheckpointError, "output_is_input", source):
        convert(source, source)
    assert source.read_bytes() == before


@pytest.mark.parametrize(
    ("table", "code", "values"),
    [
        ({"a": 1}, "vocabulary_mismatch", (1, "1,301")),
        ({f"w{n}": n for n in range(1301)}, "word_numbers_not_consecutive", (1, 1301)),
        (["a", "b"], "invalid_word_table", ()),
        ({"a": "1"}, "invalid_word_table", ()),
        ("{", "invalid_json", ()),
    ],
)
def test_wrong_word_table_fails(
    tmp_path: Path, state: State, table: Any, code: str, values: tuple[object, ...]
) -> None:
    path = tmp_path / "words.json"
    path.write_text(table if isinstance(table, str) else json.dumps(table))
    assert_rejected(published(state, tmp_path / "f.pth"), code, path, *values, vocabulary=path)


def test_convert_command_succeeds_or_fails_with_one_line(
    tmp_path: Path, state: State, word_table: Path, run_command: Any, refused: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "drn")
    source = published(state, tmp_path / "f.pth")
    done = run_command(convert, source, "--vocabulary", word_table, "--output", tmp_path / "drn.pt")
    assert quotes(done.out, "mmaction2", "stage 3", "epoch 10")
    assert f"python -m export.to_onnx --model {tmp_path / 'drn.pt'}" in caplog.text
    assert len(load_checkpoint(tmp_path / "drn.pt").vocabulary) == 1301
    refused(convert, tmp_path / "absent.pth", "--output", tmp_path / "other.pt")
    assert not (tmp_path / "other.pt").exists()
