"""Build the plans of an engine part, check their precision, and write them with metadata and layers."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calib.graph.fp32_scales import has_half_scales, with_wide_scales
from calib.graph.half_precision import fp32_nodes
from export.engine.builder import (
    BuildFailed,
    BuildOptions,
    BuiltEngine,
    build,
    wrap_library_errors,
)
from export.engine.engine_part import EnginePart
from export.engine.inspector import PlanNotLoaded
from export.engine.precision_verdict import ExpectedPrecision, engine_verdict, layer_stats_content, require
from export.engine.profiles import one_profile
from runtime.artifacts import engine_metadata
from runtime.artifacts.engine_layers import PROVEN, layers_path, packed
from runtime.backends.cuda_driver import Cuda
from runtime.core.cli import report_written
from runtime.core.errors import CheckFailed, DeviceError, ModelFileError
from runtime.core.gpu_info import cuda_gpu, cuda_version
from runtime.core.io.atomic_files import atomic_write, write_json
from runtime.core.io.digests import sha256

log = logging.getLogger("drn")


@dataclasses.dataclass
class BuildState:
    """State that the plans of one build share.

    Attributes:
        timing_cache: serialized timing cache; None before the first plan.
        one_profile: whether a plan with two optimization profiles could not be loaded.
        fp32_scales: whether a plan with FP16 scales could not be built.
    """

    timing_cache: bytes | None = None
    one_profile: bool = False
    fp32_scales: bool = False


def build_part(
    part: EnginePart, precision: str, options: BuildOptions, cache: Path | None, state: BuildState | None = None
) -> EnginePart:
    """Build an engine and those for short queries, check their precision, and write plans, metadata and layers.

    An optional engine for short queries that cannot be built is left out with a warning.

    Args:
        precision: required precision: fp32, fp16, bf16, int8 or fp8.
        cache: timing cache file, read if it exists, and updated.
        state: state that is shared with other parts of the same build.

    Returns:
        The part as it was built, with the parts for short queries that were built.

    Raises:
        ModelFileError, DeviceError: the engine, or one for short queries that is not optional, cannot be built.
        CheckFailed: the layers contradict the precision; the engine is saved as NAME.rejected.engine.
    """
    state = state or BuildState()
    shorter = _build_unrolled(part, precision, options, cache, state)
    built_engines = [other.engine for other in shorter]
    left_out = [other for other in part.unrolled if other.engine not in built_engines]
    built, part, changes = _build(part, options, cache, state)
    for change in changes:
        log.warning("%s differs from the request: %s.", part.engine.name, change)
    changes += [f"it has no plan for queries of at most {other.max_query_length} tokens" for other in left_out]
    expected = ExpectedPrecision(
        precision,
        part.precision_stats,
        part.fp32_weight_bytes,
        tf32=options.tf32,
        strongly_typed=built.strongly_typed,
        version_compatible=options.version_compatible,
        fp32_nodes=fp32_nodes(part.graph),
    )
    layers, verdict = engine_verdict(built.inspection, expected, len(built.plan), built.not_inspected_reason)
    content = _metadata(
        part, built, options, layer_stats_content(part.precision_stats, layers, verdict), cache, changes
    )
    try:
        require(verdict, precision)
    except CheckFailed as error:
        rejected = _rejected_path(part.engine)
        _write_engine(rejected, built.plan, content)
        _write_layers(rejected, built)
        raise CheckFailed(
            f"{error} The engine was saved as {rejected.name}. Try another --precision or --optimization-level.",
            code=error.code,
        ) from error
    if shorter:
        content["unrolled"] = {other.engine.name: sha256(other.engine) for other in shorter}
    _write_engine(part.engine, built.plan, content)
    _write_layers(part.engine, built)
    differences = "".join(f"; {change}" for change in changes)
    print(
        f"{part.engine.name}: {len(built.plan) / 1e6:.1f} MB, {built.library}; {precision} is {verdict}{differences}."
    )
    if verdict.name != PROVEN:
        log.warning("%s: %s is %s: %s.", part.engine.name, precision, verdict.name, verdict.reason)
    return dataclasses.replace(part, unrolled=tuple(shorter))


def _build_unrolled(
    part: EnginePart, precision: str, options: BuildOptions, cache: Path | None, state: BuildState
) -> list[EnginePart]:
    """Build the engines for short queries of a part; see `build_part`."""
    built = []
    for other in part.unrolled:
        try:
            built.append(build_part(other, precision, options, cache, state))
        except (ModelFileError, DeviceError) as error:
            if not other.optional:
                raise type(error)(
                    f"{error} Or pass --unroll 0 to build no engines for short queries.", code=error.code
                ) from error
            log.warning(
                "%s was not built, so queries of at most %d tokens use the slower engine for all queries: %s",
                *(other.engine.name, other.max_query_length, error),
            )
    return built


def _rejected_path(engine: Path) -> Path:
    return engine.with_name(f"{engine.stem}.rejected.engine")


def mark_rejected(engine: Path) -> Path:
    """Rename an engine, its metadata and its layers to NAME.rejected.engine, and return the new path."""
    content = dict(engine_metadata.read_verified(engine))
    content["sha256"] = {name: digest for name, digest in content["sha256"].items() if name != engine.name}
    if "unrolled" in content:
        content["unrolled"] = {
            _rejected_path(engine.with_name(name)).name: digest for name, digest in content["unrolled"].items()
        }
    rejected = _rejected_path(engine)
    _write_engine(rejected, engine.read_bytes(), content)
    if layers_path(engine).is_file():
        layers_path(engine).replace(layers_path(rejected))
    for old in (engine_metadata.metadata_path(engine), engine):
        old.unlink()
    return rejected


ONE_PROFILE = "it has one optimization profile (--profiles 1), because a plan with two could not be loaded"
FP32_SCALES = "its scales are FP32, because the build with FP16 scales failed"


def _build(
    part: EnginePart, options: BuildOptions, cache: Path | None, state: BuildState
) -> tuple[BuiltEngine, EnginePart, list[str]]:
    """Build a plan, and after a known failure of the library build it again with a workaround.

    Workarounds that an earlier plan of the same build needed are applied at once.

    Returns:
        The plan, the part it was built from, and each difference from the request as a clause.

    Raises:
        PlanNotLoaded: a plan with one profile cannot be loaded either.
        BuildFailed: the graph cannot be built; the error is that of the first attempt.
    """
    from export.engine.builder import load_library

    library = load_library(options.target)
    log.info("Building %s with %s %s ...", part.engine.name, library.__name__, library.__version__)
    changes: list[str] = []
    if state.one_profile and len(part.profiles) > 1:
        part = _with_one_profile(part, changes)
    if state.fp32_scales and has_half_scales(part.graph):
        part = _with_fp32_scales(part, changes)
    first: BuildFailed | None = None
    while True:
        try:
            built = _build_once(part, options, cache, state)
        except BuildFailed as error:
            first = first or error
            if not has_half_scales(part.graph):
                raise first from None
            log.warning("%s Building again with FP32 scales ...", error)
            part = _with_fp32_scales(part, changes)
        except PlanNotLoaded as error:
            if len(part.profiles) == 1:
                raise
            log.warning("%s Building again with one optimization profile ...", error)
            part = _with_one_profile(part, changes)
        else:
            state.one_profile |= ONE_PROFILE in changes
            state.fp32_scales |= FP32_SCALES in changes
            return built, part, changes


def _with_one_profile(part: EnginePart, changes: list[str]) -> EnginePart:
    """Return the part with one profile: a TensorRT 8.6 plan with two may not load (NVIDIA/TensorRT#2977)."""
    changes.append(ONE_PROFILE)
    return dataclasses.replace(part, profiles=one_profile(part.profiles))


def _with_fp32_scales(part: EnginePart, changes: list[str]) -> EnginePart:
    """Return the part with FP32 scales: Q/DQ with FP16 scales may not build (NVIDIA/TensorRT#4832)."""
    changes.append(FP32_SCALES)
    return dataclasses.replace(part, graph=with_wide_scales(part.graph))


def _build_once(part: EnginePart, options: BuildOptions, cache: Path | None, state: BuildState) -> BuiltEngine:
    known = state.timing_cache or (cache.read_bytes() if cache and cache.is_file() else None)
    options = dataclasses.replace(options, profiles=part.profiles)
    with wrap_library_errors("Building the engine"):
        built = build(part.graph.SerializeToString(), options, known)
    is_first = state.timing_cache is None
    state.timing_cache = built.timing_cache or state.timing_cache
    if cache and built.timing_cache:
        with atomic_write(cache) as temporary:
            temporary.write_bytes(built.timing_cache)
        if is_first:
            report_written(cache)
    return built


def _metadata(
    part: EnginePart,
    built: BuiltEngine,
    options: BuildOptions,
    layer_stats: dict[str, Any],
    cache: Path | None,
    changes: Sequence[str],
) -> dict[str, Any]:
    return {
        "format": engine_metadata.FORMAT,
        "manifest": part.manifest.to_dict(),
        "library": built.library,
        "cuda": cuda_version(),
        "python": sys.version.split()[0],
        "strongly_typed": built.strongly_typed,
        "target": options.target,
        "gpu": _gpu(),
        "compute_capabilities": list(options.compute_capabilities),
        "profiles": [dataclasses.asdict(profile) for profile in part.profiles],
        "options": {
            "optimization_level": options.optimization_level,
            "workspace_gib": options.workspace_gib,
            "version_compatible": options.version_compatible,
            "hardware_compatible": options.hardware_compatible,
            "tf32": options.tf32,
            "profiles": len(part.profiles),
            "changes": list(changes),
        },
        "timing_cache": sha256(cache) if cache and cache.is_file() else None,
        "census": layer_stats,
        "sha256": {part.graph_path.name: part.graph_sha256},
    }


def _write_engine(path: Path, plan: bytes, content: dict[str, Any]) -> None:
    """Write a plan and its metadata to temporary files, and rename both after they are complete."""
    hashes = {path.name: hashlib.sha256(plan).hexdigest(), **content["sha256"]}
    with atomic_write(engine_metadata.metadata_path(path)) as metadata, atomic_write(path) as temporary:
        temporary.write_bytes(plan)
        write_json(metadata, engine_metadata.with_digest({**content, "sha256": hashes}))


def _write_layers(engine: Path, built: BuiltEngine) -> None:
    """Write the output of the inspector next to an engine, if there is one."""
    if built.inspection is None:
        return
    digest = hashlib.sha256(built.plan).hexdigest()
    with atomic_write(layers_path(engine)) as temporary:
        temporary.write_bytes(packed(built.inspection, engine.name, digest, built.library))


def _gpu() -> str | None:
    """Return name, CUDA version, memory and compute capability of the GPU; None without one.

    The name is that of the driver, not of nvidia-smi, because the runtime compares it with the driver's.
    """
    if cuda_gpu() is None:
        return None
    gpu = Cuda()
    return f"{gpu.name}, CUDA {gpu.driver}, {gpu.memory()[1] >> 20} MiB, {gpu.capability}"
