"""Define fixtures: tiny networks with random weights and their exported graphs, built once."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from calib.calibrate import measure_table
from calib.calibration_set import sample_calibration_set
from calib.calibration_table import CalibrationTable, calibration_key
from calib.graph.channel_equalization import measure_channel_scales
from calib.graph.gate_normalization import normalize_gated_features
from calib.graph.graph_editing import copied
from calib.graph.onnx_graph import read_manifest
from calib.graph.split_model import split_graph, write_split_model
from calib.qdq_quantizer import channel_energies
from calib.range_estimation import collect_statistics
from export.tracing.tracer import export_model
from runtime.artifacts.manifest import Features, Manifest
from runtime.core.batch import Batch
from runtime.core.decoding import Decoding
from runtime.core.tokenizer import Vocabulary
from runtime.datasets.dataset import DataSet
from tests.shared_builds import build_once, run_directory
from tests.train.training.narrow import narrow_backbone, with_narrow_backbone
from train.checkpoints import Checkpoint, save_checkpoint
from train.network.model import DRN, DRNConfig, Scale

if TYPE_CHECKING:
    from tests.export.engine.engine_builds import EngineBuilds

__all__ = ["narrow_backbone"]

TINY = DRNConfig(vocab_size=20, embed_dim=8, hidden_dim=12, feature_dim=16, fpn_dim=16, num_segments=16)
DEEP = DRNConfig(
    vocab_size=20, embed_dim=8, hidden_dim=12, feature_dim=16, fpn_dim=16, num_segments=64, head_convs=2, lstm_layers=2
)
CONFIGS = {"tiny": TINY, "deep": DEEP}
MAX_QUERY_LENGTH = 12

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def lively(config: DRNConfig) -> DRN:
    """Return a network with random weights and batch norm statistics, which are 0 and 1 in a new one."""
    torch.manual_seed(0)
    model = DRN(config)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias, 0, 0.3)
        elif isinstance(module, nn.Conv1d):
            nn.init.normal_(module.weight, 0, (1 / module.weight[0].numel()) ** 0.5)
            if module.bias is not None:
                nn.init.normal_(module.bias, 0, 0.3)
        elif isinstance(module, Scale):
            nn.init.uniform_(module.scale, 0.5, 1.5)
        elif isinstance(module, nn.LSTM | nn.Linear):
            for parameter in module.parameters():
                nn.init.normal_(parameter, 0, 0.4)
    return model.eval()


def random_inputs(config: DRNConfig, lengths: list[int], longest: int | None = None, seed: int = 0) -> Inputs:
    """Return inputs for queries of these lengths, padded to `longest`."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, config.vocab_size + 1, (len(lengths), longest or max(lengths)))
    tokens[np.arange(tokens.shape[1]) >= np.array(lengths)[:, None]] = 0
    features = rng.standard_normal((len(lengths), config.num_segments, config.feature_dim)).clip(0)
    spans = np.sort(rng.random((len(lengths), config.num_segments, 2)))
    return (
        torch.tensor(tokens, dtype=torch.int32),
        torch.tensor(lengths, dtype=torch.int32),
        torch.tensor(features, dtype=torch.float32),
        torch.tensor(spans, dtype=torch.float32),
    )


def manifest(config: DRNConfig) -> Manifest:
    words = {f"word{index}": index for index in range(1, config.vocab_size + 1)}
    return Manifest(
        Vocabulary(words),
        Decoding(num_segments=config.num_segments),
        Features(dim=config.feature_dim),
        max_query_length=MAX_QUERY_LENGTH,
        sources={"drn.pt": "0" * 64},
    )


def with_changed_weights(
    graph: onnx.ModelProto, change: Callable[[np.ndarray], np.ndarray], *names: str
) -> onnx.ModelProto:
    """Return a copy of a graph with some weights changed."""
    result = copied(graph)
    tensors = {tensor.name: tensor for tensor in result.graph.initializer}
    for name in names:
        values = np.asarray(change(onnx.numpy_helper.to_array(tensors[name])), np.float32)
        tensors[name].CopyFrom(onnx.numpy_helper.from_array(values, name))
    return result


@pytest.fixture(scope="session")
def networks() -> dict[str, DRN]:
    with with_narrow_backbone():
        return {name: lively(config) for name, config in CONFIGS.items()}


@pytest.fixture(scope="session")
def exported(networks: dict[str, DRN]) -> dict[str, onnx.ModelProto]:
    return {name: export_model(model, manifest(model.config)) for name, model in networks.items()}


@pytest.fixture(scope="session")
def checkpoint(networks: dict[str, DRN], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny network as a `drn.pt`."""
    model = networks["tiny"]
    about = manifest(model.config)
    path = tmp_path_factory.mktemp("checkpoint") / "drn.pt"
    save_checkpoint(
        path,
        Checkpoint(model.config, about.features, about.vocabulary, about.decoding, model.state_dict(), {"stage": 2}),
    )
    return path


@pytest.fixture
def model(models: Path, tmp_path: Path) -> Path:
    """A copy of the trained `drn.onnx`, alone in a directory."""
    return Path(shutil.copy(models / "drn.onnx", tmp_path))


@pytest.fixture(scope="session")
def wrong(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained `drn.onnx` with the opposite sign in the IoU head."""
    path = tmp_path_factory.mktemp("wrong") / "wrong.onnx"
    names = ("fcos.head.iou_scores.1.weight", "fcos.head.scales")
    onnx.save(with_changed_weights(onnx.load(models / "drn.onnx"), np.negative, *names), path)
    return path


@pytest.fixture(scope="session")
def table(models: Path, planted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration table of the trained `drn.onnx`."""

    def measure(directory: Path) -> None:
        graph = onnx.load(models / "drn.onnx")
        drawn = sample_calibration_set(DataSet(planted), read_manifest(graph), samples=48, held_out=32)
        measure_table(graph, drawn, "minmax", threads=1).save(directory / "drn.calibration.json")

    return build_once(run_directory(tmp_path_factory) / "calibration", measure) / "drn.calibration.json"


@pytest.fixture(scope="session")
def c3d(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graph of a narrow C3D, next to its checkpoint `c3d.pt`."""
    from export.to_onnx import to_onnx
    from tests.export.narrow_c3d import TINY, lively
    from train.extractors.c3d import MEANS
    from train.extractors.checkpoint import save_extractor
    from train.extractors.published import ExtractorCheckpoint

    path = tmp_path_factory.mktemp("c3d") / "c3d.pt"
    save_extractor(path, ExtractorCheckpoint(TINY, MEANS["plain"], lively().state_dict(), {"c3d.pickle": "1" * 64}))
    return to_onnx(path, path.with_name("c3d.onnx"))


@pytest.fixture(scope="session")
def i3d(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graph of a narrow I3D with class scores for clips of 16 frames, one every 64, next to `i3d.pt`."""
    from export.to_onnx import to_onnx
    from tests.export.narrow_i3d import pytorch_i3d
    from train.extractors.checkpoint import from_published, save_extractor

    path = tmp_path_factory.mktemp("i3d") / "i3d.pt"
    save_extractor(path, from_published(pytorch_i3d(), "rgb_imagenet.pt", {"rgb_imagenet.pt": "1" * 64}))
    return to_onnx(path, path.with_name("i3d.onnx"), clock=(16, 64), class_scores=True)


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> EngineBuilds:
    """Builds of engines by a double of TensorRT 11.4."""
    from tests.export.engine.engine_builds import EngineBuilds

    builds = EngineBuilds()
    builds.install(monkeypatch)
    return builds


def table_for(model: onnx.ModelProto, config: DRNConfig, *, balance: bool) -> CalibrationTable:
    """Return a calibration table of random inputs, with or without channel equalization."""
    batches = [Batch(*(tensor.numpy() for tensor in random_inputs(config, [4, 9, 1, 12])))]
    observed = normalize_gated_features(model)
    gains = {name: tuple(row) for name, row in measure_channel_scales(observed, batches).items()} if balance else {}
    statistics = collect_statistics(observed, channel_energies(observed), batches, gains=gains)
    return CalibrationTable(statistics.ranges("minmax"), calibration_key(model, "0" * 64, "minmax"), gains=gains)


@pytest.fixture
def graph(exported: dict[str, onnx.ModelProto], tmp_path: Path) -> Path:
    """The tiny network as drn.onnx, with its two parts in the same directory."""
    onnx.save(exported["tiny"], tmp_path / "drn.onnx")
    write_split_model(*split_graph(exported["tiny"]), tmp_path / "drn.onnx")
    return tmp_path / "drn.onnx"


def signature(values: Iterable[onnx.ValueInfoProto]) -> dict[str, tuple[int, list[object]]]:
    """Return the element type and the sizes of each input or output by name."""
    return {
        value.name: (
            value.type.tensor_type.elem_type,
            [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim],
        )
        for value in values
    }
