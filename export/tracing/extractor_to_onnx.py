"""A C3D checkpoint becomes an ONNX extractor, proven equal to torch."""

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
"""Clips in the batches that are checked; a full-size C3D takes a second or two for each on a CPU."""


def export_extractor(checkpoint: Path, output: Path, *, opset: int = MIN_OPSET) -> Path:
    """Export a `c3d.pt` to ONNX, once ONNX Runtime is seen to answer as torch does; see `export.to_onnx.to_onnx`."""
    log.info("Reading %s ...", checkpoint)
    loaded = load_c3d(checkpoint)
    model, manifest = loaded.model(), loaded.manifest(source_hash(checkpoint))
    with atomic_write(output) as temporary:
        log.info("Tracing C3D ...")
        temporary.write_bytes(with_digest(export_c3d(model, manifest, opset=opset).SerializeToString()))
        difference = check_c3d(temporary, model)
        size = temporary.stat().st_size
    print(f"{OUTPUT}: largest difference {difference:.1e}, {TOLERANCE:.0e} is allowed")
    log.info("%s: %.1f MB, opset %d, checked against torch for %s clips.", output, size / 1e6, opset, BATCH_SIZES)
    suggest_next_command("runtime.extract", "VIDEO", "--extractor", output, "--output", "DIR")
    return output


def export_c3d(model: C3D, manifest: ExtractorManifest, *, opset: int = MIN_OPSET) -> onnx.ModelProto:
    """Return the graph of a C3D: `clips` (N, 16, 112, 112, 3) uint8 in RGB to `features` (N, D), any N.

    Frames go in as they are decoded, a quarter of the bytes of float32, and the mean is taken off inside.
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
        f"C3D: features of clips of {WINDOW} frames. What it takes stands under the metadata key {METADATA_KEY!r}.",
    )


def check_c3d(path: Path, model: C3D) -> float:
    """Return the largest difference between an ONNX file and torch, as a share of the largest feature.

    Raises:
        CheckFailed: it is beyond the tolerance.
    """
    session = open_session(path, optimized=True)
    rng = np.random.default_rng(0)
    largest = 0.0
    for size in BATCH_SIZES:
        clips = smooth_clips(rng, (size, WINDOW, *CROP, 3))
        with torch.inference_mode():
            expected = model(torch.from_numpy(clips)).numpy()
        (result,) = session.run([OUTPUT], {INPUT: clips})
        # Of the largest feature, however small that is: made-up weights give small ones.
        difference = float(np.abs(result - expected).max() / max(expected.max(), np.finfo(np.float32).tiny))
        # `not <=` also refuses NaN.
        if not difference <= TOLERANCE:
            raise CheckFailed(
                f"The features of the graph differ from torch by {difference:.1e} of their largest for {size} clips, "
                f"and {TOLERANCE:.0e} is allowed; nothing was kept.",
                code="parity_failed",
            )
        largest = max(largest, difference)
    return largest
