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
    moments: bool = False,
    prepare: bool = False,
    opset: int = MIN_OPSET,
    max_query_length: int | None = None,
    clock: tuple[int, int] | None = None,
    class_scores: bool = False,
) -> Path:
    """Export a checkpoint to one ONNX file, and check it against torch in ONNX Runtime.

    Batch size and query length are dynamic. The largest differences are printed; no file is written if they exceed
    the tolerance.

    Example:
        python -m export.to_onnx --model drn.pt --output drn.onnx --split

    Args:
        checkpoint: drn.pt from `python -m train` or `python -m train.convert`; or c3d.pt or i3d.pt from the latter,
            which becomes a clip feature extractor.
        output: ONNX file to write.
        split: also write the model in two parts, NAME.video.onnx and NAME.query.onnx, so that each video is encoded
            once. Pass the query part as --model.
        moments: also write NAME.moments.onnx, a graph with decoding and NMS that returns moments in seconds, and
            NAME.words.txt, the words in the order of their ids. See docs/formats.md.
        prepare: has no effect. Version 0.1 wrote two more files, for a gain too small to keep.
        opset: opset of the graph, 17 to 23. TensorRT 8.6 reads at most 17.
        max_query_length: maximum number of tokens of a query; every length up to it is checked. Default: 64, or the
            longest query of the training data set.
        clock: WINDOW STRIDE of an extractor's clips in frames. Default: 16 8. C3D needs 16 frames.
        class_scores: also export the class probabilities of I3D, as a second output.

    Returns:
        `output`.

    Raises:
        CheckpointError: `checkpoint` cannot be read or is not a drn.pt, c3d.pt or i3d.pt.
        OutputError: `output` cannot be written.
        CheckFailed: the graph and torch differ by more than the tolerance.
    """
    options = ExportOptions(Path(checkpoint), Path(output), split, moments, opset, max_query_length)
    options.check()
    if prepare:
        log.warning("--prepare no longer has an effect. Leave it out.")
    from train.extractors.checkpoint import is_extractor_file

    if is_extractor_file(options.checkpoint):
        from export.tracing.extractor_to_onnx import export_extractor

        if split or moments:
            raise ShapeError(
                f"{checkpoint} is a feature extractor, to which --split and --moments do not apply. Remove them.",
                code="inapplicable_option",
            )
        return export_extractor(options.checkpoint, options.output, opset=opset, clock=clock, class_scores=class_scores)
    if clock or class_scores:
        raise ShapeError(
            f"{checkpoint} is no feature extractor, so --clock and --class-scores do not apply. Remove these options.",
            code="inapplicable_option",
        )
    suggest_next_command("runtime.evaluate", "--model", export_checkpoint(options), "--data", "DIR")
    return options.output


if __name__ == "__main__":
    command(to_onnx)
