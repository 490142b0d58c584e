"""Export a checkpoint to ONNX: `python -m export.to_onnx`."""

from __future__ import annotations

import logging
from pathlib import Path

from calib.graph.opset import MIN_OPSET
from export.tracing.checkpoint_to_onnx import ExportOptions, export_checkpoint
from runtime.core.cli import command, suggest_next_command
from runtime.core.errors import ShapeError

log = logging.getLogger("drn")


def to_onnx(
    checkpoint: Path,
    output: Path,
    *,
    split: bool = False,
    prepare: bool = False,
    opset: int = MIN_OPSET,
    max_query_length: int | None = None,
) -> Path:
    """Export a checkpoint to one self-sufficient ONNX file, once ONNX Runtime is seen to answer as torch does.

    Batch size and query length are free. The largest differences are printed; beyond the tolerance nothing is kept.

    Args:
        checkpoint: a `drn.pt`, of `python -m train` or `python -m train.convert`; or a `c3d.pt` of the latter, which
            becomes an extractor of clip features: of the other flags only --opset concerns it.
        output: the ONNX file to write.
        split: also write the model in two files, NAME.video.onnx and NAME.query.onnx, so that a video is encoded once
            and asked often; the second is the one to give as --model.
        prepare: has no effect. Version 0.1 wrote two more files, for a gain too small to keep.
        opset: of the graph, 17 to 23; TensorRT 8.6 reads 17 at most.
        max_query_length: most words of a query; every length up to it is checked. When not given, 64 or the longest
            query of the data set that the network learnt from.

    Returns:
        `output`.

    Raises:
        CheckpointError: `checkpoint` cannot be read or is not one of ours.
        OutputError: `output` cannot be written.
        CheckFailed: the graph and torch differ by more than the tolerance.
    """
    options = ExportOptions(Path(checkpoint), Path(output), split, opset, max_query_length)
    options.check()
    if prepare:
        log.warning("--prepare no longer has an effect. Leave it out.")
    from train.c3d import is_c3d_file

    if is_c3d_file(options.checkpoint):
        from export.tracing.extractor_to_onnx import export_extractor

        if split:
            raise ShapeError(
                f"{checkpoint} is a feature extractor, which cannot be split. Remove --split.",
                code="inapplicable_option",
            )
        return export_extractor(options.checkpoint, options.output, opset=opset)
    suggest_next_command("runtime.evaluate", "--model", export_checkpoint(options), "--data", "DIR")
    return options.output


if __name__ == "__main__":
    command(to_onnx)
