"""Export a checkpoint to ONNX files after ONNX Runtime has reproduced the outputs of torch."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from calib.graph.conv_padding import extract_padding
from calib.graph.moments import with_moments, word_list
from calib.graph.opset import MAX_OPSET, MIN_OPSET
from calib.graph.split_model import pair_paths, split_graph, write_split_model
from export.tracing.moment_check import check_moments
from export.tracing.torch_check import BATCH_SIZES, check_against_torch, check_pair_against_torch, format_differences
from export.tracing.tracer import export_model, producer
from runtime.artifacts.manifest import METADATA_KEY, Manifest
from runtime.artifacts.onnx_metadata import read_metadata, with_digest
from runtime.core.cli import report_written
from runtime.core.errors import ModelFileError, OutputError, ShapeError, check_option, importing
from runtime.core.io.atomic_files import atomic_write, check_writable, write_text
from runtime.core.io.input_files import is_same_file

if TYPE_CHECKING:
    import onnx

    from train.network.model import DRNConfig

log = logging.getLogger("drn")


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """The options of `python -m export.to_onnx`, which documents each."""

    checkpoint: Path
    output: Path
    split: bool = False
    moments: bool = False
    opset: int = MIN_OPSET
    max_query_length: int | None = None

    @property
    def parts(self) -> tuple[Path, ...]:
        """Return the files that are written in addition to the output."""
        return (*(pair_paths(self.output) if self.split else ()), *(self.moment_files if self.moments else ()))

    @property
    def moment_files(self) -> tuple[Path, Path]:
        """Return the graph that returns moments and the word list: drn.moments.onnx and drn.words.txt for drn.onnx."""
        return self.output.with_suffix(".moments.onnx"), self.output.with_suffix(".words.txt")

    def check(self) -> None:
        """Check the options before any file is read.

        Raises:
            ShapeError: a number is out of range.
            OutputError: the output has another suffix than .onnx, or is the checkpoint.
            DeviceError: a library is not installed.
        """
        if not MIN_OPSET <= self.opset <= MAX_OPSET:
            raise ShapeError(
                f"Expected an opset of {MIN_OPSET} to {MAX_OPSET}, got {self.opset}. Leave --opset out.",
                code="unsupported_opset",
            )
        check_option("--max-query-length", self.max_query_length, 1, error=ShapeError)
        if self.output.suffix != ".onnx" and not self.output.is_dir():
            raise OutputError(
                f"Expected --output with the suffix .onnx, got {self.output}. Choose another name.", code="wrong_suffix"
            )
        with importing(
            "A library that the export needs (torch, onnx, onnxscript, onnxruntime)",
            "cpu,export",
            " (gpu instead of cpu for CUDA)",
        ):
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401

            import train.checkpoints  # noqa: F401
        if is_same_file(self.output, self.checkpoint):
            raise OutputError(f"--output {self.output} is the checkpoint. Choose another name.", code="output_is_input")


def export_checkpoint(options: ExportOptions) -> Path:
    """Export a DRN checkpoint with dynamic batch size and query length.

    Returns:
        The file that answers queries: the output, or for `split` the query part.

    Raises:
        CheckpointError: the checkpoint cannot be read, or is not a drn-deploy file.
        ShapeError, OutputError, DeviceError: see `ExportOptions.check`; or a file cannot be written.
        CheckFailed: a graph and torch differ by more than the tolerance; no file is written.
    """
    options.check()
    import onnxruntime

    from train.checkpoints import load_checkpoint, source_hash

    output = options.output
    for part in options.parts:
        check_writable(part, options.checkpoint)
    log.info("Reading %s ...", options.checkpoint)
    loaded = load_checkpoint(options.checkpoint)
    max_query_length = options.max_query_length or loaded.longest_query
    manifest = loaded.manifest(max_query_length, sources=source_hash(options.checkpoint), producer=producer())
    model = loaded.model()
    # Opened before the export, so that an unwritable output is reported at once.
    with atomic_write(output) as temporary:
        log.info("Tracing the network (10 to 30 s) ...")
        graph = export_model(model, manifest, opset=options.opset)
        temporary.write_bytes(with_digest(extract_padding(graph).SerializeToString()))
        differences = check_against_torch(temporary, model, max_query_length)
        size = temporary.stat().st_size
        answering = output
        if options.split:
            pair = split_graph(graph)
            split_differences = check_pair_against_torch(*pair, model, max_query_length)
            differences = {name: max(value, split_differences[name]) for name, value in differences.items()}
            *_, answering = write_split_model(*pair, output)
        if options.moments:
            _write_moments(graph, options, model.config, manifest)
    print(format_differences(differences))
    log.info(
        "%s: %.1f MB, opset %d; ONNX Runtime %s matches torch for batch sizes %s and query lengths 1 to %d.",
        output,
        size / 1e6,
        options.opset,
        onnxruntime.__version__,
        ", ".join(map(str, BATCH_SIZES)),
        max_query_length,
    )
    if options.split:
        log.info("%s: the two parts, checked in the same way.", " ".join(path.name for path in pair_paths(output)))
    report_written(output, *options.parts)
    _warn_of_older_files(options, manifest)
    if not manifest.vocabulary.words:
        log.warning(
            "%s has no vocabulary, so it cannot answer sentences. Convert its checkpoint again with --vocabulary.",
            output,
        )
    return answering


def _warn_of_older_files(options: ExportOptions, manifest: Manifest) -> None:
    """Warn of the files of another checkpoint that look like further files of this export."""
    for path, flag in ((pair_paths(options.output)[1], "--split"), (options.moment_files[0], "--moments")):
        if path in options.parts or not path.is_file():
            continue
        with contextlib.suppress(ModelFileError):
            if Manifest.from_json(read_metadata(path).get(METADATA_KEY), str(path)).sources == manifest.sources:
                continue
        log.warning(
            "%s is not of %s, but of an earlier export. Delete it, or export again with %s.",
            *(path, options.checkpoint, flag),
        )


def _write_moments(graph: onnx.ModelProto, options: ExportOptions, config: DRNConfig, manifest: Manifest) -> None:
    """Write the graph that returns moments, after comparing them with those of the runtime, and the word list."""
    path, words = options.moment_files
    with atomic_write(path) as temporary:
        temporary.write_bytes(with_digest(with_moments(extract_padding(graph)).SerializeToString()))
        check_moments(temporary, config, manifest)
        write_text(words, word_list(manifest))
