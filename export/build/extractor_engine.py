"""Build the engine of a clip feature extractor: convert its graph, compare its features with FP32, build a plan.

The converted graph runs in ONNX Runtime on any machine. No torch is needed where a graph is given.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from calib.graph.half_precision import emulate_bf16, measure_magnitudes
from calib.graph.onnx_graph import read_extractor
from calib.graph.onnx_session import open_session
from calib.graph.precision_audit import PrecisionStats, audit_graph, require_precision
from export.build.artifacts import format_shares
from export.build.build_config import BuildConfig, validate_keep_modules
from export.build.reduced_precision import ConversionOptions, convert_precision, held_in_fp32
from export.engine.builder import BuildOptions, runs_here
from export.engine.engine_part import EnginePart
from export.engine.engine_writer import build_part, mark_rejected
from export.engine.profiles import Profile, SizeRange
from export.tracing.synthetic_clips import synthetic_clips
from runtime.artifacts.engine_metadata import read_verified
from runtime.artifacts.extractor_manifest import METADATA_KEY, ExtractorManifest
from runtime.artifacts.onnx_metadata import read_metadata, with_digest
from runtime.backends.batch_shapes import MinOptMax
from runtime.core.cli import suggest_next_command
from runtime.core.errors import CheckFailed, GroundingError
from runtime.core.io.atomic_files import Staging, locked, write_json
from runtime.core.io.digests import sha256
from runtime.media.extractors import Extractor, open_extractor

if TYPE_CHECKING:
    import onnx

log = logging.getLogger("drn")

FEATURES = "features"


@dataclasses.dataclass(frozen=True)
class FeatureTolerance:
    """The tolerance of features compared with FP32, over every clip of `synthetic_clips`.

    Attributes:
        cosine: least, of the two vectors of a clip.
        difference: most, as a share of the largest feature of the clip.
    """

    cosine: float
    difference: float

    def broken_by(self, measured: FeatureTolerance) -> bool:
        # `not` also refuses NaN.
        return not (measured.cosine >= self.cosine and measured.difference <= self.difference)

    def __str__(self) -> str:
        return f"cosine {self.cosine:.6f}, difference {self.difference:.1e} of the largest"


# Half precision rounds each tensor by 5e-4 (BF16 by 4e-3), and eleven layers stand one after another.
FEATURE_TOLERANCES = {
    "fp32": FeatureTolerance(0.99999, 1e-4),
    "fp16": FeatureTolerance(0.9999, 1e-2),
    "bf16": FeatureTolerance(0.999, 5e-2),
}


def extractor_file_kind(model: Path) -> str | None:
    """Return of which kind a file is, `checkpoint`, `onnx` or `published`, if it is an extractor; else None."""
    if not model.is_file():
        return None
    if model.suffix == ".onnx":
        try:
            return "onnx" if METADATA_KEY in read_metadata(model) else None
        except GroundingError:
            return None
    if model.suffix == ".pt":
        try:
            from train.c3d import is_c3d_file
        except ImportError:
            return None
        return "checkpoint" if is_c3d_file(model) else None
    if model.name.endswith((".pth", ".tar", ".pickle")):
        try:
            from train.c3d import published_layout
            from train.convert import read
        except ImportError:
            return None
        return "published" if published_layout(read(model).weights) else None
    return None


def build_extractor(
    job: BuildConfig,
    options: BuildOptions,
    batch: SizeRange,
    keep: tuple[str, ...],
    cache: Path | None,
    threads: int | None,
) -> Path:
    """Build the engine of an extractor, or its converted graph alone; see `export.build_engine.build_engine`.

    Raises:
        GroundingError: the precision, or the graph, is none that can be built.
        CheckFailed: the precision is not in the graph, or the features are too far from those of FP32.
    """
    source = _source_graph(job)
    graph, manifest = read_extractor(source)
    validate_keep_modules(graph, job.precision, keep)
    shape = manifest.window, *manifest.crop, 3
    smallest, best, largest = ((size, *shape) for size in batch)
    profile = Profile("clips", MinOptMax(*batch), MinOptMax(1, 1, 1), {"clips": (smallest, best, largest)})
    with locked(job.output.parent, job.output.name), Staging() as staging:
        staged = dataclasses.replace(job, requested_output=staging.path(job.output))
        try:
            part, result = _checked_graph(staged, source, graph, manifest, profile, keep, threads)
            report = _report(job, source, part, result)
            if job.target != "onnxruntime":
                build_part(part, staged.precision, options, cache)
                compared = read_verified(part.engine)["census"]
                report["engine_precision"] = {key: compared[key] for key in ("verdict", "reason")}
                if runs_here(options):
                    report["engine"] = dataclasses.asdict(_checked_engine(staged, part, source, threads))
            write_json(staged.sibling_path("parity.json"), report)
        except CheckFailed:
            staging.settle(lambda name: ".rejected." in name)
            raise
        settled = staging.settle()
    print(f"Written: {', '.join(path.name for path in settled)}.")
    runs = job.output if job.target == "onnxruntime" or runs_here(options) else job.graph_path
    suggest_next_command("runtime.extract", "VIDEO", "--extractor", runs, "--output", "DIR")
    print(job.output)
    return job.output


def _source_graph(job: BuildConfig) -> Path:
    """Return the FP32 graph, converting and exporting first where MODEL is a checkpoint."""
    if job.kind == "onnx" or job.source.exists():
        return job.source
    from export.tracing.extractor_to_onnx import export_extractor

    if job.kind == "published":
        from train.convert import convert

        convert(job.model, job.checkpoint)

    return export_extractor(job.checkpoint, job.source)


def _checked_graph(
    job: BuildConfig,
    source: Path,
    graph: onnx.ModelProto,
    manifest: ExtractorManifest,
    profile: Profile,
    keep: tuple[str, ...],
    threads: int | None,
) -> tuple[EnginePart, FeatureTolerance]:
    """Write the graph in the precision asked for, and return what an engine is built of and how near its features are.

    Raises:
        CheckFailed: it has not that precision, or other features; it is then kept as rejected.
    """
    import onnx

    if job.precision == "fp16":
        keep = (*keep, *_overflowing(graph, manifest))
    graph_path = convert_precision(graph, job.precision, ConversionOptions(keep), None, str(source))
    counted, weights = audit_graph(graph_path.graph), sum(audit_graph(graph).weight_bytes.values())
    about = dataclasses.replace(
        manifest, precision=job.precision, sources={**manifest.sources, source.name: sha256(source)}
    )
    del graph_path.graph.metadata_props[:]
    onnx.helper.set_model_props(graph_path.graph, {METADATA_KEY: about.to_json()})
    print(f"{job.graph_path.name}: {format_shares(counted)}.")
    job.graph_path.write_bytes(with_digest(graph_path.graph.SerializeToString()))
    try:
        require_precision(counted, job.precision)
        runs = job.graph_path if job.precision != "bf16" else emulate_bf16(graph_path.graph)
        result = compare(_Graph(source, threads), _Graph(runs, threads), manifest)
        _check_features(job, result, "the graph")
    except CheckFailed as error:
        rejected = job.rejected("onnx")
        job.graph_path.rename(rejected)
        raise CheckFailed(
            f"{error} It is kept as {rejected.name}; keep layers in FP32 with --keep.", code=error.code
        ) from error
    part = EnginePart(
        graph_path.graph, about, job.graph_path, sha256(job.graph_path), job.output, [profile], counted, weights
    )
    return part, result


def _overflowing(graph: onnx.ModelProto, manifest: ExtractorManifest) -> tuple[str, ...]:
    """Return the layers that come too near the largest FP16 number on made-up clips, and say so.

    Features alone would not tell on a CPU, where ONNX Runtime computes FP16 layers in FP32.
    """
    batches = (SimpleNamespace(clips=clip) for clip in synthetic_clips(manifest))
    return held_in_fp32(measure_magnitudes(graph, batches))


def _checked_engine(job: BuildConfig, part: EnginePart, source: Path, threads: int | None) -> FeatureTolerance:
    """Return how near the features of an engine are to FP32's, on this machine's GPU; what is too far is rejected."""
    extractor = open_extractor(part.engine)
    try:
        result = compare(_Graph(source, threads), extractor, extractor.manifest)
    finally:
        extractor.close()  # type: ignore[attr-defined]
    try:
        _check_features(job, result, "the engine")
    except CheckFailed as error:
        raise CheckFailed(f"{error} It is kept as {mark_rejected(part.engine).name}.", code=error.code) from error
    return result


def _check_features(job: BuildConfig, measured: FeatureTolerance, what: str) -> None:
    promise = FEATURE_TOLERANCES[job.precision]
    print(f"features of {what} against FP32: {measured}; promised: {promise}.")
    if promise.broken_by(measured):
        raise CheckFailed(
            f"The features of {what} are too far from FP32's ({measured}; promised: {promise}).", code="parity_failed"
        )


def _report(job: BuildConfig, source: Path, part: EnginePart, measured: FeatureTolerance) -> dict[str, Any]:
    counted: PrecisionStats = part.precision_stats
    return {
        "reference": {"name": source.name, "sha256": sha256(source)},
        "model": {"name": part.graph_path.name, "sha256": part.graph_sha256, "precision": job.precision},
        "promised": dataclasses.asdict(FEATURE_TOLERANCES[job.precision]),
        "twin": dataclasses.asdict(measured),
        "census": counted.to_dict(),
    }


class _Graph:
    """A graph in ONNX Runtime, on the CPU: what is compared must not depend on where it is compared."""

    def __init__(self, source: onnx.ModelProto | Path, threads: int | None) -> None:
        self._session = open_session(source, threads, optimized=True)

    def extract(self, clips: np.ndarray) -> np.ndarray:
        result: np.ndarray = self._session.run([FEATURES], {"clips": clips})[0]
        return result


def compare(reference: _Graph, other: _Graph | Extractor, manifest: ExtractorManifest) -> FeatureTolerance:
    """Return how near the features of made-up clips are."""
    cosine, difference = 1.0, 0.0
    for clip in synthetic_clips(manifest):
        expected, result = (graph.extract(clip)[0].astype(np.float64) for graph in (reference, other))
        largest = np.abs(expected).max()
        if largest == 0 and not result.any():
            continue
        norms = np.linalg.norm(expected) * np.linalg.norm(result)
        # np.minimum and np.maximum let NaN through; the built-in ones do not always.
        cosine = float(np.minimum(cosine, expected @ result / norms if norms else 0.0))
        difference = float(np.maximum(difference, np.abs(result - expected).max() / max(largest, 1e-30)))
    return FeatureTolerance(cosine, difference)
