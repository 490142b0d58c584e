"""Train one small network on a data set of 95 and 18 queries, export it, and compare its files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import onnx

from export.parity.compare import compare
from export.parity.parity_result import ParityResult
from export.parity.run_parity import load_for_comparison
from export.tracing.tracer import export_model, producer
from runtime.artifacts.manifest import METADATA_KEY, Manifest
from runtime.core.io.digests import sha256
from runtime.datasets.dataset import DataSet
from tests.train.training.narrow import with_narrow_backbone
from train.__main__ import train
from train.checkpoints import load_checkpoint


def write_models(directory: Path, data: Path) -> Path:
    """Write `drn.pt` and `drn.onnx` of a network that learned the data set, and return their directory.

    Its backbone is narrow; tests that load `drn.pt` import `tests.train.training.narrow.narrow_backbone`.
    """
    with with_narrow_backbone():
        checkpoint = train(
            data,
            directory,
            epochs=(8, 1, 1),
            lr=(1e-2, 1e-3, 1e-4),
            batch_size=16,
            embed_dim=16,
            hidden_dim=16,
            fpn_dim=32,
            iou_target="all",
            validate_on="none",
            device="cpu",
        )
        loaded = load_checkpoint(checkpoint)
        model = loaded.model()
    manifest = loaded.manifest(16, sources={checkpoint.name: sha256(checkpoint)}, producer=producer())
    onnx.save(export_model(model, manifest, opset=19), directory / "drn.onnx")
    return directory


def save_twin(model: onnx.ModelProto, source: Path, path: Path, precision: str) -> Path:
    """Write a graph made from `source`, with its manifest in another precision."""
    about = {entry.key: entry.value for entry in onnx.load(source).metadata_props}
    manifest = Manifest.from_json(about[METADATA_KEY])
    manifest = dataclasses.replace(
        manifest, precision=precision, sources={**manifest.sources, source.name: sha256(source)}
    )
    onnx.helper.set_model_props(model, {METADATA_KEY: manifest.to_json()})
    onnx.save(model, path)
    return path


def parity(reference: Path, other: Path, data: Path, split: str = "test", **options: Any) -> ParityResult:
    """Compare two model files on a split, on one CPU thread."""
    data_set = DataSet(data)
    device = options.pop("device", "cpu")
    sides = [load_for_comparison(path, device, 1, exact=True) for path in (reference, other)]
    return compare(*sides, data_set, data_set.annotations(split), **options)
