"""Build the engine of a clip feature extractor: convert its graph, compare its features with FP32, build a plan."""

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
from calib.graph.precision_audit import audit_graph, require_precision
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
    """The deviation of features from FP32 over all clips of `synthetic_clips`, measured or tolerated.

    Attributes:
        cosine: minimum cosine similarity of the two features of a clip.
        difference: maximum absolute difference, relative to the largest feature of the clip.
    """

    cosine: float
    difference: float

    def is_exceeded_by(self, measured: FeatureTolerance) -> bool:
        """Return whether measured deviations exceed this tolerance."""
        # `not` also rejects NaN.
        return not (measured.cosine >= self.cosine and measured.difference <= self.difference)

    def __str__(self) -> str:
        return f"cosine similarity {self.cosine:.6f}, relative difference {self.difference:.1e}"


# FP16 rounds each tensor by 5e-4, BF16 by 4e-3, over eleven consecutive layers.
FEATURE_TOLERANCES = {
    "fp32": FeatureTolerance(0.99999, 1e-4),
    "fp16": FeatureTolerance(0.9999, 1e-2),
    "bf16": FeatureTolerance(0.999, 5e-2),
}


def extractor_file_kind(model: Path) -> str | None:
    """Return the kind of an extractor file: checkpoint, onnx or published. None for other files."""
    if not model.is_file():
        return None
    if model.suffix == ".onnx":
        try:
            return "onnx" if METADATA_KEY in read_metadata(model) else None
        except GroundingError:
            return None
    if model.suffix == ".pt":
        try:
            from train.extractors.checkpoint import is_extractor_file
        except ImportError:
            return None
        return "checkpoint" if is_extractor_file(model) else None
    if model.name.endswith((".pth", ".tar", ".pickle")):
        try:
            from train.convert import read
            from train.extractors.checkpoint import is_published_extractor
        except ImportError:
            return None
        return "published" if is_published_extractor(read(model).weights) else None
    return None


def build_extractor(
    job: BuildConfig,
    options: BuildOptions,
    batch: SizeRange,
    keep: tuple[str, ...],
    cache: Path | None,
    threads: int | None,
) -> Path:
    """Build the engine of an extractor, or for ONNX Runtime its converted graph.

    Args:
        job: files of the build.
        options: of the engine.
        batch: min, opt and max number of clips.
        keep: layers that stay in FP32.
        cache: timing cache file.
        threads: number of CPU threads.

    Returns:
        The path of the engine or the graph.

    Raises:
        GroundingError: the graph cannot be read or built.
        CheckFailed: the graph or the engine does not have the precision, or its features exceed the tolerance.
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
            part, deviation = _convert_and_check(staged, source, graph, manifest, profile, keep, threads)
            report = _report(job, source, part, deviation)
            if job.target != "onnxruntime":
                build_part(part, staged.precision, options, cache)
                layer_stats = read_verified(part.engine)["census"]
                report["engine_precision"] = {key: layer_stats[key] for key in ("verdict", "reason")}
                if runs_here(options):
                    report["engine"] = dataclasses.asdict(_check_engine(staged, part, source, threads))
            write_json(staged.sibling_path("parity.json"), report)
        except CheckFailed:
            staging.commit(lambda name: ".rejected." in name)
            raise
        written = staging.commit()
    print(f"Written: {', '.join(path.name for path in written)}.")
    runs = job.output if job.target == "onnxruntime" or runs_here(options) else job.graph_path
    suggest_next_command("runtime.extract", "VIDEO", "--extractor", runs, "--output", "DIR")
    print(job.output)
    return job.output


def _source_graph(job: BuildConfig) -> Path:
    """Return the path of the FP32 graph, after exporting the model if it is a checkpoint."""
    if job.kind == "onnx" or job.source.exists():
        return job.source
    from export.tracing.extractor_to_onnx import export_extractor

    if job.kind == "published":
        from train.convert import convert

        convert(job.model, job.checkpoint)
    return export_extractor(job.checkpoint, job.source)


def _convert_and_check(
    job: BuildConfig,
    source: Path,
    graph: onnx.ModelProto,
    manifest: ExtractorManifest,
    profile: Profile,
    keep: tuple[str, ...],
    threads: int | None,
) -> tuple[EnginePart, FeatureTolerance]:
    """Write the graph in the requested precision, and compare its features with FP32.

    Returns:
        The source of the engine, and the deviation of the features.

    Raises:
        CheckFailed: a check failed; the graph is saved as MODEL.PRECISION.rejected.onnx.
    """
    import onnx

    if job.precision == "fp16":
        keep = (*keep, *_scan_for_overflow(graph, manifest))
    converted = convert_precision(graph, job.precision, ConversionOptions(keep), None, str(source)).graph
    stats, weights = audit_graph(converted), sum(audit_graph(graph).weight_bytes.values())
    sources = {**manifest.sources, source.name: sha256(source)}
    manifest = dataclasses.replace(manifest, precision=job.precision, sources=sources)
    del converted.metadata_props[:]
    onnx.helper.set_model_props(converted, {METADATA_KEY: manifest.to_json()})
    print(f"{job.graph_path.name}: {format_shares(stats)}.")
    job.graph_path.write_bytes(with_digest(converted.SerializeToString()))
    try:
        require_precision(stats, job.precision)
        runnable = job.graph_path if job.precision != "bf16" else emulate_bf16(converted)
        deviation = compare(_Graph(source, threads), _Graph(runnable, threads), manifest)
        _check_features(job, deviation, "graph")
    except CheckFailed as error:
        rejected = job.rejected_path("onnx")
        job.graph_path.rename(rejected)
        raise CheckFailed(
            f"{error} The graph was saved as {rejected.name}. Keep layers in FP32 with --keep.", code=error.code
        ) from error
    digest = sha256(job.graph_path)
    part = EnginePart(converted, manifest, job.graph_path, digest, job.output, [profile], stats, weights)
    return part, deviation


def _scan_for_overflow(graph: onnx.ModelProto, manifest: ExtractorManifest) -> tuple[str, ...]:
    """Return the layers that could overflow in FP16 on synthetic clips.

    The comparison of features cannot show this on a CPU, where ONNX Runtime computes FP16 layers in FP32.
    """
    batches = (SimpleNamespace(clips=clip) for clip in synthetic_clips(manifest))
    return held_in_fp32(measure_magnitudes(graph, batches))


def _check_engine(job: BuildConfig, part: EnginePart, source: Path, threads: int | None) -> FeatureTolerance:
    """Compare the features of an engine on the GPU with FP32; rename the engine if they exceed the tolerance."""
    extractor = open_extractor(part.engine)
    try:
        deviation = compare(_Graph(source, threads), extractor, extractor.manifest)
    finally:
        extractor.close()  # type: ignore[attr-defined]
    try:
        _check_features(job, deviation, "engine")
    except CheckFailed as error:
        rejected = mark_rejected(part.engine)
        raise CheckFailed(f"{error} The engine was saved as {rejected.name}.", code=error.code) from error
    return deviation


def _check_features(job: BuildConfig, measured: FeatureTolerance, subject: str) -> None:
    tolerance = FEATURE_TOLERANCES[job.precision]
    print(f"Features of the {subject} compared with FP32: {measured}; tolerance: {tolerance}.")
    if tolerance.is_exceeded_by(measured):
        raise CheckFailed(
            f"The features of the {subject} exceed the tolerance ({measured}; tolerance: {tolerance}).",
            code="parity_failed",
        )


def _report(job: BuildConfig, source: Path, part: EnginePart, measured: FeatureTolerance) -> dict[str, Any]:
    return {
        "reference": {"name": source.name, "sha256": sha256(source)},
        "model": {"name": part.graph_path.name, "sha256": part.graph_sha256, "precision": job.precision},
        "promised": dataclasses.asdict(FEATURE_TOLERANCES[job.precision]),
        "twin": dataclasses.asdict(measured),
        "census": part.precision_stats.to_dict(),
    }


class _Graph:
    """An extractor graph in ONNX Runtime on the CPU, so that results do not depend on the machine's GPU."""

    def __init__(self, source: onnx.ModelProto | Path, threads: int | None) -> None:
        self._session = open_session(source, threads, optimized=True)

    def extract(self, clips: np.ndarray) -> np.ndarray:
        result: np.ndarray = self._session.run([FEATURES], {"clips": clips})[0]
        return result


def compare(reference: _Graph, other: _Graph | Extractor, manifest: ExtractorManifest) -> FeatureTolerance:
    """Return the deviation of the features of `other` on synthetic clips."""
    cosine, difference = 1.0, 0.0
    for clip in synthetic_clips(manifest):
        expected, actual = (graph.extract(clip)[0].astype(np.float64) for graph in (reference, other))
        largest = np.abs(expected).max()
        if largest == 0 and not actual.any():
            continue
        norms = np.linalg.norm(expected) * np.linalg.norm(actual)
        # Unlike `min` and `max`, np.minimum and np.maximum always return NaN for NaN.
        cosine = float(np.minimum(cosine, expected @ actual / norms if norms else 0.0))
        difference = float(np.maximum(difference, np.abs(actual - expected).max() / max(largest, 1e-30)))
    return FeatureTolerance(cosine, difference)
