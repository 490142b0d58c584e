"""A checkpoint becomes ONNX: traced, tidied, proven equal to torch, and only then kept."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from calib.graph.conv_padding import padding_apart
from calib.graph.split_model import pair_paths, prepared_paths, split_graph, write_pair
from export.tracing.torch_check import BATCH_SIZES, check_against_torch, check_pair_against_torch, report
from export.tracing.tracer import NEWEST_OPSET, OLDEST_OPSET, export_model, producer
from runtime.artifacts.onnx_metadata import sealed
from runtime.core.cli import command, next_command
from runtime.core.errors import DeviceError, OutputError, ShapeError
from runtime.core.io.files import check_writable, replace_when_whole

if TYPE_CHECKING:
    pass

log = logging.getLogger("drn")


"""Largest difference between ONNX Runtime and torch, as a share of the output's largest value (or of 1 where that is
smaller). Folded and merged layers round once more, over sums of up to 12,288 products; ten times less is usual."""


def to_onnx(
    checkpoint: Path,
    output: Path,
    *,
    split: bool = False,
    prepare: bool = False,
    opset: int = OLDEST_OPSET,
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
        prepare: with --split, also write what makes dozens of queries on one video at once faster still on a CPU,
            NAME.prepare.onnx and NAME.prepared.onnx.
        opset: of the graph, 17 to 23; TensorRT 8.6 reads 17 at most.
        max_query_length: most words of a query; every length up to it is checked. When not given, 64 or the longest
            query of the data set that the network learnt from.

    Returns:
        `output`.

    Raises:
        CheckpointError: `checkpoint` cannot be read or is not one of ours.
        OutputError: `output` cannot be written.
        PromiseBroken: the graph and torch differ by more than the tolerance.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    if not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise ShapeError(
            f"Opset {opset} was asked for and {OLDEST_OPSET} to {NEWEST_OPSET} can be written; leave --opset out.",
            code="unsupported_opset",
        )
    if max_query_length is not None and max_query_length < 1:
        raise ShapeError(
            f"A query has at least 1 word, and --max-query-length {max_query_length} was asked for.",
            code="invalid_option",
        )
    if output.suffix != ".onnx" and not output.is_dir():
        raise OutputError(
            f"--output {output} should end in .onnx: models are told apart by their names.", code="wrong_suffix"
        )
    try:
        import onnx  # noqa: F401 - needed by what is called below
        import onnxruntime

        from train.checkpoints import load_checkpoint, source_hash
        from train.network.c3d import is_c3d_file
    except ImportError as error:
        raise DeviceError(
            f"Exporting needs torch, onnx, onnxscript and onnxruntime, and one cannot be imported ({error}); "
            "run `pip install 'drn-deploy[export]'`.",
            code="missing_library",
        ) from error

    if output.resolve() == checkpoint.resolve():
        raise OutputError(f"--output {output} is the checkpoint itself; choose another.", code="output_is_input")
    if is_c3d_file(checkpoint):
        from export.tracing.extractor_to_onnx import export_extractor

        if split:
            raise ShapeError(
                f"{checkpoint} is an extractor of clip features, which is not split; leave --split out.",
                code="inapplicable_option",
            )
        return export_extractor(checkpoint, output, opset=opset)
    if prepare and not split:
        raise ShapeError("--prepare writes parts of a model that is split; pass --split too.", code="missing_option")
    parts = (*pair_paths(output), *(prepared_paths(output) if prepare else ())) if split else ()
    for part in parts:
        check_writable(part, checkpoint)
    log.info("Reading %s ...", checkpoint)
    loaded = load_checkpoint(checkpoint)
    max_query_length = max_query_length or loaded.longest_query
    manifest = loaded.manifest(max_query_length, sources=source_hash(checkpoint), producer=producer())
    model = loaded.model()
    # Entered before the work, so that an unwritable output is known at once.
    with replace_when_whole(output) as temporary:
        log.info("Tracing the network (10 to 30 s) ...")
        exported = export_model(model, manifest, opset=opset)
        temporary.write_bytes(sealed(padding_apart(exported).SerializeToString()))
        differences = check_against_torch(temporary, model, max_query_length)
        size = temporary.stat().st_size
        query = output
        if split:
            pair = split_graph(exported)
            for name, difference in check_pair_against_torch(*pair, model, max_query_length, prepare=prepare).items():
                differences[name] = max(differences[name], difference)
            *_, query = write_pair(*pair, output, prepare=prepare)
    print(report(differences))
    log.info(
        "%s: %.1f MB, opset %d, checked against torch in ONNX Runtime %s for batches of %s and every query length "
        "from 1 to %d.",
        output,
        size / 1e6,
        opset,
        onnxruntime.__version__,
        ", ".join(map(str, BATCH_SIZES)),
        max_query_length,
    )
    if split:
        log.info("%s: the same in parts, checked likewise.", ", ".join(path.name for path in parts))
    if not manifest.vocabulary.words:
        log.warning(
            "%s has no words, so sentences cannot be asked of it: convert its checkpoint again with --vocabulary.",
            output,
        )
    next_command("runtime.evaluate", "--model", query, "--data", "DIR")
    return output


if __name__ == "__main__":
    command(to_onnx)
