"""Export the checkpoint of a clip feature extractor to ONNX, checked against torch."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from calib.graph.onnx_session import open_session
from calib.graph.opset import MIN_OPSET
from export.tracing.synthetic_clips import smooth_clips
from export.tracing.torch_check import TOLERANCE, check_difference
from export.tracing.tracer import TRACED_OPSET, finalize_model, silence_exporter
from runtime.artifacts.extractor_manifest import METADATA_KEY, ExtractorManifest
from runtime.artifacts.onnx_metadata import with_digest
from runtime.core.cli import report_written, suggest_next_command
from runtime.core.errors import ShapeError
from runtime.core.io.atomic_files import atomic_write
from runtime.core.pooling import ClipTiming
from train.checkpoints import source_hash
from train.extractors.checkpoint import load_extractor
from train.extractors.i3d import I3D

log = logging.getLogger("drn")

INPUT, OUTPUT, SCORES = "clips", "features", "class_scores"
BATCH_SIZES = (1, 3)
"""Batch sizes that are checked; a network of full size takes one to two seconds per clip on a CPU."""


def export_extractor(
    checkpoint: Path,
    output: Path,
    *,
    opset: int = MIN_OPSET,
    clock: tuple[int, int] | None = None,
    class_scores: bool = False,
) -> Path:
    """Export a `c3d.pt` or `i3d.pt` to ONNX, and check it against torch.

    Args:
        opset: opset of the graph, 17 to 23.
        clock: clip length and stride in frames; None for 16 and 8.
        class_scores: whether the graph also returns class probabilities.

    Raises:
        CheckpointError: the checkpoint cannot be read, or its network does not accept clips of this length.
        ShapeError: the network has no class scores.
        OutputError: the output cannot be written.
        CheckFailed: the graph and torch differ by more than the tolerance; no file is written.
    """
    log.info("Reading %s ...", checkpoint)
    loaded = load_extractor(checkpoint)
    manifest = loaded.manifest(source_hash(checkpoint), ClipTiming(*clock) if clock else None)
    model = loaded.model()
    if class_scores:
        if not isinstance(model, I3D):
            raise ShapeError(
                f"{checkpoint} is {manifest.kind}, which has no class scores. Remove --class-scores.",
                code="inapplicable_option",
            )
        model.returns_scores = True
    with atomic_write(output) as temporary:
        log.info("Tracing %s ...", manifest.kind)
        temporary.write_bytes(with_digest(trace_extractor(model, manifest, opset=opset).SerializeToString()))
        differences = check_extractor(temporary, model, manifest)
        size = temporary.stat().st_size
    for name, difference in differences.items():
        print(f"{name}: max difference {difference:.1e}, tolerance {TOLERANCE:.0e}")
    sizes = " and ".join(map(str, BATCH_SIZES))
    log.info("%s: %.1f MB, opset %d; ONNX Runtime matches torch for batch sizes %s.", output, size / 1e6, opset, sizes)
    report_written(output)
    suggest_next_command("runtime.extract", "VIDEO", "--extractor", output, "--output", "DIR")
    return output


def output_names(model: nn.Module) -> list[str]:
    """Return the names of the outputs of a network's graph."""
    return [OUTPUT, SCORES] if getattr(model, "returns_scores", False) else [OUTPUT]


def trace_extractor(model: nn.Module, manifest: ExtractorManifest, *, opset: int = MIN_OPSET) -> onnx.ModelProto:
    """Return the graph of an extractor: `clips` (N, window, height, width, 3) uint8 in RGB to `features` (N, D), any N.

    The graph normalizes pixels itself, so that the input is decoded frames: a quarter of the bytes of float32.
    """
    batch = torch.export.Dim("batch", min=1)
    with silence_exporter(), torch.no_grad():
        program = torch.onnx.export(
            model,
            (torch.zeros(3, manifest.window, *manifest.crop, 3, dtype=torch.uint8),),
            dynamo=True,
            opset_version=max(opset, TRACED_OPSET),
            dynamic_shapes=({0: batch},),
            input_names=[INPUT],
            output_names=output_names(model),
            verbose=False,
        )
    assert program is not None
    return finalize_model(
        program.model_proto,
        opset,
        {METADATA_KEY: manifest.to_json()},
        f"{manifest.kind}: features of clips of {manifest.window} frames. The manifest is under the metadata key "
        f"{METADATA_KEY!r}.",
    )


def check_extractor(path: Path, model: nn.Module, manifest: ExtractorManifest) -> dict[str, float]:
    """Return the largest difference between an ONNX file and torch for each output, relative to its largest value.

    Raises:
        CheckFailed: a difference exceeds the tolerance.
    """
    session = open_session(path, optimized=True)
    names = output_names(model)
    rng = np.random.default_rng(0)
    differences = dict.fromkeys(names, 0.0)
    for size in BATCH_SIZES:
        clips = smooth_clips(rng, (size, manifest.window, *manifest.crop, 3))
        with torch.inference_mode():
            outputs = model(torch.from_numpy(clips))
        expected = outputs if isinstance(outputs, tuple) else (outputs,)
        for name, actual, reference in zip(names, session.run(names, {INPUT: clips}), expected):
            # Relative to the largest value even if that is below 1: random weights give small features.
            largest = max(float(reference.max()), np.finfo(np.float32).tiny)
            difference = float(np.abs(actual - reference.numpy()).max()) / largest
            check_difference(name, difference, f"{size} clips")
            differences[name] = max(differences[name], difference)
    return differences
