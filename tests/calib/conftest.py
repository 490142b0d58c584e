"""Share a small data set, a tiny network for it, and their calibration between the tests of `calib`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from calib.accuracy import Candidate, table_of
from calib.calibrate import measure_statistics
from calib.calibration_set import CalibrationSet, sample_calibration_set
from calib.calibration_table import CalibrationTable
from calib.graph.graph_editing import copied
from calib.range_estimation import ActivationStatistics
from export.tracing.tracer import export_model
from runtime.artifacts.manifest import Features, Manifest
from runtime.core.batch import Batch
from runtime.core.decoding import Decoding
from runtime.datasets.dataset import DataSet
from tests.export.conftest import lively
from train.network.model import DRNConfig


@pytest.fixture(scope="session")
def data_set(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    """298 training sentences of 64 videos, 68 test sentences, D = 16."""
    from train.simulate import simulate

    directory = tmp_path_factory.mktemp("calibration") / "data"
    simulate(directory, feature_dim=16, videos=80, difficulty="easy", seed=1)
    return DataSet(directory)


@pytest.fixture(scope="session")
def model(data_set: DataSet) -> onnx.ModelProto:
    config = DRNConfig(vocab_size=len(data_set.words), embed_dim=8, hidden_dim=12, feature_dim=16, fpn_dim=16)
    network = lively(config)
    # For moments of a few segments at many locations.
    network.fcos.head.bbox_pred.weight.data *= 0.3
    manifest = Manifest(data_set.vocabulary, Decoding(), Features(dim=16), sources={"drn.pt": "0" * 64})
    return export_model(network, manifest)


@pytest.fixture(scope="session")
def manifest(data_set: DataSet) -> Manifest:
    return Manifest(data_set.vocabulary, Decoding(), Features(dim=16))


@pytest.fixture(scope="session")
def drawn(data_set: DataSet, manifest: Manifest) -> CalibrationSet:
    return sample_calibration_set(data_set, manifest, samples=64, seed=0, held_out=48)


@pytest.fixture(scope="session")
def statistics(model: onnx.ModelProto, drawn: CalibrationSet) -> ActivationStatistics:
    return measure_statistics(model, drawn, batch_size=16, threads=1)


@pytest.fixture(scope="session")
def table(model: onnx.ModelProto, statistics: ActivationStatistics, drawn: CalibrationSet) -> CalibrationTable:
    return table_of(model, statistics, drawn, Candidate("mse"))


@pytest.fixture(scope="session")
def batch(drawn: CalibrationSet, manifest: Manifest) -> Batch:
    return next(drawn.batches(manifest, 32))


@pytest.fixture(scope="session")
def onnx_file(model: onnx.ModelProto, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "drn.onnx"
    onnx.save(model, path)
    return path


def weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Return the constants of a graph by name."""
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def altered(model: onnx.ModelProto, by: float = 1e-3) -> onnx.ModelProto:
    """Return a copy in which one bias of one convolution differs."""
    other = copied(model)
    tensor = next(entry for entry in other.graph.initializer if entry.name == "prop_fc.bias")
    values = onnx.numpy_helper.to_array(tensor).copy()
    values[0] += by
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    return other
