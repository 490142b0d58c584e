"""Build the engine of a clip feature extractor: convert its graph, compare its features with FP32, build a plan."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx

from calib.graph.half_precision import convert_to_half, emulate_bf16, measure_magnitudes
from calib.graph.onnx_graph import read_extractor
from calib.graph.onnx_session import open_session
from calib.graph.opset import opset_of
from calib.graph.precision_audit import audit_graph, require_precision
from export.build.artifacts import format_shares
from export.build.build_config import BuildConfig, BuildRequest
from export.build.extractor_clips import ExtractorClips
from export.build.extractor_quantizer import extractor_policy, quantize_extractor
from export.build.reduced_precision import (
    OPSETS,
    ConversionOptions,
    convert_precision,
    held_in_fp32,
    validate_keep_modules,
)
from export.engine.builder import BuildOptions, runs_here
from export.engine.engine_part import EnginePart
from export.engine.engine_writer import build_part, mark_rejected
from export.engine.profiles import Profile
from runtime.artifacts.engine_metadata import read_verified
from runtime.artifacts.extractor_manifest import METADATA_KEY, ExtractorManifest
from runtime.artifacts.onnx_metadata import read_metadata, with_digest
from runtime.backends.batch_shapes import MinOptMax
from runtime.core.cli import report_written, suggest_next_command
from runtime.core.errors import CheckFailed, GroundingError
from runtime.core.io.atomic_files import locked, write_json
from runtime.core.io.digests import sha256
from runtime.core.io.staging import Staging
from runtime.media.extractors import Extractor, open_extractor

log = logging.getLogger("drn")

FEATURES = "features"


@dataclasses.dataclass(frozen=True)
class FeatureTolerance:
    """The deviation of features from FP32 over several clips, measured or tolerated.

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


# FP16 rounds each tensor by 5e-4, BF16 by 4e-3, over eleven consecutive layers. INT8 has 127 or 255 steps a tensor;
# docs/your-own-video.md has the deviations of a trained I3D.
FEATURE_TOLERANCES = {
    "fp32": FeatureTolerance(0.99999, 1e-4),
    "fp16": FeatureTolerance(0.9999, 1e-2),
    "bf16": FeatureTolerance(0.999, 5e-2),
    "int8": FeatureTolerance(0.98, 0.3),
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


def build_extractor(job: BuildConfig, options: BuildOptions, request: BuildRequest) -> Path:
    """Build the engine of an extractor, or for ONNX Runtime its converted graph.

    Args:
        request: options of the command; `keep` names layers that stay in higher precision.

    Returns:
        The path of the engine or the graph.

    Raises:
        GroundingError: the graph cannot be read or built.
        CheckFailed: the graph or the engine does not have the precision, or its features exceed the tolerance.
    """
    source = _source_graph(job)
    graph, manifest = read_extractor(source)
    is_quantized = job.precision == "int8"
    clips = ExtractorClips.select(manifest, request.calib_videos, calibrated=is_quantized)
    if is_quantized:
        hashes = {path.name: sha256(path) for path in request.calib_videos}
        manifest = dataclasses.replace(manifest, sources={**manifest.sources, **hashes})
    shape = manifest.window, *manifest.crop, 3
    smallest, best, largest = ((size, *shape) for size in request.batch)
    profile = Profile("clips", MinOptMax(*request.batch), MinOptMax(1, 1, 1), {"clips": (smallest, best, largest)})
    with locked(job.output.parent, job.output.name), Staging() as staging:
        staged = dataclasses.replace(job, requested_output=staging.path(job.output))
        try:
            converted, method = _convert(job, graph, clips, request)
            part = _write_graph(staged, source, graph, converted, manifest, profile)
            deviations = _check_graph(staged, part, source, clips, request.threads)
            report = _report(job, source, part, deviations, method)
            if not job.library:
                build_part(part, staged.precision, options, request.timing_cache)
                layer_stats = read_verified(part.engine)["census"]
                report["engine_precision"] = {key: layer_stats[key] for key in ("verdict", "reason")}
                if runs_here(options):
                    report |= _by_origin("engine", _check_engine(staged, part, source, clips, request.threads))
            write_json(staged.sibling_path("parity.json"), report)
        except CheckFailed:
            report_written(*staging.commit(lambda name: ".rejected." in name))
            raise
        written = staging.commit()
    report_written(*written)
    runs = job.output if job.library or runs_here(options) else job.graph_path
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


def _convert(
    job: BuildConfig, graph: onnx.ModelProto, clips: ExtractorClips, request: BuildRequest
) -> tuple[onnx.ModelProto, str]:
    """Return the graph in the requested precision, and for INT8 the method that selected its ranges, else ""."""
    every_clip = [*clips.calibration, *itertools.chain.from_iterable(clips.compared.values())]
    if job.precision == "int8":
        policy = extractor_policy(graph, request.keep, unsigned=job.library is not None)
        opset = opset_of(graph) if job.library else OPSETS["int8"]
        quantized, method = quantize_extractor(
            graph, clips.calibration, request.calib_method, policy, opset, request.threads
        )
        if not job.library:
            quantized = convert_to_half(quantized, "fp16", _scan_for_overflow(graph, every_clip))
        return quantized, method
    validate_keep_modules(graph, job.precision, request.keep)
    keep = request.keep
    if job.precision == "fp16":
        keep = (*keep, *_scan_for_overflow(graph, every_clip))
    return convert_precision(graph, job.precision, ConversionOptions(keep), None).graph, ""


def _scan_for_overflow(graph: onnx.ModelProto, clips: Sequence[np.ndarray]) -> tuple[str, ...]:
    """Return the layers that could overflow in FP16 on these clips.

    The comparison of features cannot show this on a CPU, where ONNX Runtime computes FP16 layers in FP32.
    """
    return held_in_fp32(measure_magnitudes(graph, (SimpleNamespace(clips=clip) for clip in clips)))


def _write_graph(
    job: BuildConfig,
    source: Path,
    graph: onnx.ModelProto,
    converted: onnx.ModelProto,
    manifest: ExtractorManifest,
    profile: Profile,
) -> EnginePart:
    """Write a converted graph with its manifest, and return the source of the engine."""
    stats, weights = audit_graph(converted), sum(audit_graph(graph).weight_bytes.values())
    sources = {**manifest.sources, source.name: sha256(source)}
    manifest = dataclasses.replace(manifest, precision=job.precision, sources=sources)
    del converted.metadata_props[:]
    onnx.helper.set_model_props(converted, {METADATA_KEY: manifest.to_json()})
    print(f"{job.graph_path.name}: {format_shares(stats)}.")
    job.graph_path.write_bytes(with_digest(converted.SerializeToString()))
    digest = sha256(job.graph_path)
    return EnginePart(converted, manifest, job.graph_path, digest, job.output, [profile], stats, weights)


def _check_graph(
    job: BuildConfig, part: EnginePart, source: Path, clips: ExtractorClips, threads: int | None
) -> dict[str, FeatureTolerance]:
    """Return the deviation of the features of the written graph from FP32, by the origin of the clips.

    Raises:
        CheckFailed: a check failed; the graph is saved as MODEL.PRECISION.rejected.onnx.
    """
    try:
        require_precision(part.precision_stats, job.precision)
        runnable = job.graph_path if job.precision != "bf16" else emulate_bf16(part.graph)
        return _deviations(job, _Graph(source, threads), _Graph(runnable, threads), clips, "graph")
    except CheckFailed as error:
        rejected = job.rejected_path("onnx")
        job.graph_path.rename(rejected)
        raise CheckFailed(
            f"{error} The graph was saved as {rejected.name}. Keep layers in higher precision with --keep.",
            code=error.code,
        ) from error


def _check_engine(
    job: BuildConfig, part: EnginePart, source: Path, clips: ExtractorClips, threads: int | None
) -> dict[str, FeatureTolerance]:
    """Compare the features of an engine on the GPU with FP32; rename the engine if they exceed the tolerance."""
    extractor = open_extractor(part.engine)
    try:
        return _deviations(job, _Graph(source, threads), extractor, clips, "engine")
    except CheckFailed as error:
        rejected = mark_rejected(part.engine)
        raise CheckFailed(
            f"{error} The engine was saved as {rejected.name}. Keep layers in FP32 with --keep.", code=error.code
        ) from error
    finally:
        extractor.close()  # type: ignore[attr-defined]


def _deviations(
    job: BuildConfig, reference: _Graph, other: _Graph | Extractor, clips: ExtractorClips, subject: str
) -> dict[str, FeatureTolerance]:
    """Return the deviations of features by the origin of the clips; CheckFailed if one exceeds the tolerance."""
    tolerance = FEATURE_TOLERANCES[job.precision]
    deviations: dict[str, FeatureTolerance] = {}
    for origin, compared in clips.compared.items():
        measured = deviations[origin] = compare(reference, other, compared)
        print(
            f"Features of the {subject} on {len(compared)} {origin} clips compared with FP32: {measured}; tolerance: "
            f"{tolerance}."
        )
        if tolerance.is_exceeded_by(measured):
            raise CheckFailed(
                f"The features of the {subject} on {origin} clips exceed the tolerance ({measured}; tolerance: "
                f"{tolerance}).",
                code="parity_failed",
            )
    return deviations


def _report(
    job: BuildConfig, source: Path, part: EnginePart, deviations: Mapping[str, FeatureTolerance], method: str
) -> dict[str, Any]:
    return {
        "reference": {"name": source.name, "sha256": sha256(source)},
        "model": {"name": part.graph_path.name, "sha256": part.graph_sha256, "precision": job.precision},
        "promised": dataclasses.asdict(FEATURE_TOLERANCES[job.precision]),
        **_by_origin("twin", deviations),
        "census": part.precision_stats.to_dict(),
        **({"method": method} if method else {}),
    }


def _by_origin(key: str, deviations: Mapping[str, FeatureTolerance]) -> dict[str, Any]:
    """Return the worst deviation as entry KEY, and the deviation on clips of videos, if any, as entry KEY_real."""
    worst = FeatureTolerance(
        min(entry.cosine for entry in deviations.values()), max(entry.difference for entry in deviations.values())
    )
    real = {f"{key}_real": dataclasses.asdict(deviations["real"])} if "real" in deviations else {}
    return {key: dataclasses.asdict(worst), **real}


class _Graph:
    """An extractor graph in ONNX Runtime on the CPU, so that results do not depend on the machine's GPU."""

    def __init__(self, source: onnx.ModelProto | Path, threads: int | None) -> None:
        self._session = open_session(source, threads, optimized=True)

    def extract(self, clips: np.ndarray) -> np.ndarray:
        result: np.ndarray = self._session.run([FEATURES], {"clips": clips})[0]
        return result


def compare(reference: _Graph, other: _Graph | Extractor, clips: Sequence[np.ndarray]) -> FeatureTolerance:
    """Return the deviation of the features of `other` on clips, each (1, window, height, width, 3) uint8."""
    cosine, difference = 1.0, 0.0
    for clip in clips:
        expected, actual = (graph.extract(clip)[0].astype(np.float64) for graph in (reference, other))
        largest = np.abs(expected).max()
        if largest == 0 and not actual.any():
            continue
        norms = np.linalg.norm(expected) * np.linalg.norm(actual)
        # Unlike `min` and `max`, np.minimum and np.maximum always return NaN for NaN.
        cosine = float(np.minimum(cosine, expected @ actual / norms if norms else 0.0))
        difference = float(np.maximum(difference, np.abs(actual - expected).max() / max(largest, 1e-30)))
    return FeatureTolerance(cosine, difference)
