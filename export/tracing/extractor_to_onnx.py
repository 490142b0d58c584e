"""Export a C3D checkpoint to an ONNX feature extractor, checked against torch."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import torch

from calib.graph.onnx_session import open_session
from calib.graph.opset import MIN_OPSET
from export.tracing.synthetic_clips import smooth_clips
from export.tracing.torch_check import TOLERANCE
from export.tracing.tracer import TRACED_OPSET, finalize_model, silence_exporter
from runtime.artifacts.extractor_manifest import METADATA_KEY, ExtractorManifest
from runtime.artifacts.onnx_metadata import with_digest
from runtime.core.cli import suggest_next_command
from runtime.core.errors import CheckFailed
from runtime.core.io.atomic_files import atomic_write
from train.c3d import C3D, CROP, WINDOW, load_c3d
from train.checkpoints import source_hash

log = logging.getLogger("drn")

INPUT, OUTPUT = "clips", "features"
BATCH_SIZES = (1, 3)
"""Batch sizes that are checked; a full-size C3D takes one to two seconds per clip on a CPU."""


def export_extractor(checkpoint: Path, output: Path, *, opset: int = MIN_OPSET) -> Path:
    """Export a `c3d.pt` to ONNX; see `export.to_onnx.to_onnx`.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        OutputError: the output cannot be written.
        CheckFailed: the graph and torch differ by more than the tolerance; no file is written.
    """
    log.info("Reading %s ...", checkpoint)
    loaded = load_c3d(checkpoint)
    model, manifest = loaded.model(), loaded.manifest(source_hash(checkpoint))
    with atomic_write(output) as temporary:
        log.info("Tracing C3D ...")
        temporary.write_bytes(with_digest(export_c3d(model, manifest, opset=opset).SerializeToString()))
        difference = check_c3d(temporary, model)
        size = temporary.stat().st_size
    print(f"{OUTPUT}: max difference {difference:.1e}, tolerance {TOLERANCE:.0e}")
    sizes = " and ".join(map(str, BATCH_SIZES))
    log.info("%s: %.1f MB, opset %d; ONNX Runtime matches torch for batch sizes %s.", output, size / 1e6, opset, sizes)
    suggest_next_command("runtime.extract", "VIDEO", "--extractor", output, "--output", "DIR")
    return output


def export_c3d(model: C3D, manifest: ExtractorManifest, *, opset: int = MIN_OPSET) -> onnx.ModelProto:
    """Return the graph of a C3D: `clips` (N, 16, 112, 112, 3) uint8 in RGB to `features` (N, D) float32, any N.

    The graph subtracts the mean itself, so that the input is decoded frames: a quarter of the bytes of float32.
    """
    batch = torch.export.Dim("batch", min=1)
    with silence_exporter(), torch.no_grad():
        program = torch.onnx.export(
            model,
            (torch.zeros(3, WINDOW, *CROP, 3, dtype=torch.uint8),),
            dynamo=True,
            opset_version=max(opset, TRACED_OPSET),
            dynamic_shapes=({0: batch},),
            input_names=[INPUT],
            output_names=[OUTPUT],
            verbose=False,
        )
    assert program is not None
    return finalize_model(
        program.model_proto,
        opset,
        {METADATA_KEY: manifest.to_json()},
        f"C3D: features of clips of {WINDOW} frames. The manifest is under the metadata key {METADATA_KEY!r}.",
    )


def check_c3d(path: Path, model: C3D) -> float:
    """Return the largest difference between an ONNX file and torch, relative to the largest feature.

    Raises:
        CheckFailed: the difference exceeds the tolerance.
    """
    session = open_session(path, optimized=True)
    rng = np.random.default_rng(0)
    max_difference = 0.0
    for size in BATCH_SIZES:
        clips = smooth_clips(rng, (size, WINDOW, *CROP, 3))
        with torch.inference_mode():
            expected = model(torch.from_numpy(clips)).numpy()
        (actual,) = session.run([OUTPUT], {INPUT: clips})
        # Relative to the largest feature even if that is below 1: random weights give small features.
        difference = float(np.abs(actual - expected).max() / max(expected.max(), np.finfo(np.float32).tiny))
        # `not <=` also rejects NaN.
        if not difference <= TOLERANCE:
            raise CheckFailed(
                f"Expected features of the graph within {TOLERANCE:.0e} of torch, got a relative difference of "
                f"{difference:.1e} for {size} clips. No file was written.",
                code="parity_failed",
            )
        max_difference = max(max_difference, difference)
    return max_difference
