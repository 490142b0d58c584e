"""Build TensorRT plans from ONNX graphs with TensorRT 8.6, 10, 11 or TensorRT-RTX.

The graph determines the precision, because networks are strongly typed. TensorRT 8.6 has no such networks and needs the
preparation in `export.engine.weakly_typed`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import logging
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, Literal

from export.engine import weakly_typed
from export.engine.inspector import inspect_plan
from export.engine.profiles import Profile
from runtime.artifacts.engine_layers import Inspection
from runtime.backends.cuda_driver import Cuda
from runtime.backends.tensorrt_logger import explain_startup_failure, logger_for
from runtime.core.errors import DeviceError, GroundingError, ModelFileError, check_option
from runtime.core.gpu_info import cuda_gpu, cuda_version

log = logging.getLogger("drn")

Target = Literal["tensorrt", "tensorrt-rtx"]

_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_INSTALL_HINTS = {
    "tensorrt": "Install TensorRT (10 and 11 from NVIDIA's index; 8.6 from PyPI, for Python 3.10 and older).",
    "tensorrt-rtx": "Run `pip install '.[rtx]'` in the drn-deploy directory.",
}
SUPPORTED_MAJORS = {"tensorrt": (8, 10, 11), "tensorrt-rtx": (1,)}


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """The options of an engine build. The defaults are those of TensorRT.

    Attributes:
        target: library that builds the engine.
        precision: precision of the graph: fp32, fp16, bf16, int8 or fp8.
        profiles: optimization profiles, at least one.
        optimization_level: builder optimization level, 0 to 5.
        workspace_gib: maximum scratch memory on the device, in GiB.
        version_compatible: build a plan that later versions with the same major version can load.
        hardware_compatible: build a plan for Ampere and later GPUs.
        compute_capabilities: compute capabilities for TensorRT-RTX, as "8.6"; empty for the GPU of this machine.
        tf32: allow TF32 (10-bit mantissa) for FP32 operations.
    """

    target: Target
    precision: str
    profiles: Sequence[Profile]
    optimization_level: int | None = None
    workspace_gib: float | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    compute_capabilities: Sequence[str] = ()
    tf32: bool = False


@dataclasses.dataclass(frozen=True)
class BuiltEngine:
    """A built engine.

    Attributes:
        plan: serialized engine.
        library: name and version of the library that built it.
        strongly_typed: whether the graph determined the precision.
        inspection: output of the engine inspector; None if the plan cannot be opened on this machine.
        timing_cache: measured kernel times, for the next build.
        not_inspected_reason: reason for a missing inspection, as a clause.
    """

    plan: bytes
    library: str
    strongly_typed: bool
    inspection: Inspection | None
    timing_cache: bytes | None
    not_inspected_reason: str = ""


class BuildFailed(ModelFileError):
    """TensorRT parsed the graph, but could not build an engine."""

    code = "build_failed"


def cannot_open_reason(options: BuildOptions) -> str:
    """Return why a plan with these options cannot be opened on this machine, as a clause; empty if it can.

    TensorRT builds for the GPU of the machine. TensorRT-RTX also builds for other GPUs, and does not load such a plan
    ("The engine cannot run on this GPU, which has compute capability", in libtensorrt_rtx.so of 1.7.1).
    """
    if options.target == "tensorrt":
        return ""
    gpu = cuda_gpu()
    if gpu is None:
        return "this machine has no GPU to open the plan"
    if options.compute_capabilities and gpu.capability not in options.compute_capabilities:
        built_for = ", ".join(options.compute_capabilities)
        return f"the plan is for compute capability {built_for}, but the GPU of this machine has {gpu.capability}"
    return ""


def runs_here(options: BuildOptions) -> bool:
    """Return whether a plan with these options runs on this machine."""
    return cuda_gpu() is not None and not cannot_open_reason(options)


def load_library(target: Target) -> ModuleType:
    """Import TensorRT or TensorRT-RTX.

    Raises:
        DeviceError: the library cannot be imported, or its version is not supported.
    """
    try:
        library = importlib.import_module(_MODULES[target])
    except ImportError as error:
        raise DeviceError(
            f"--target {target} needs {_MODULES[target]}, which cannot be imported ({error}). {_INSTALL_HINTS[target]}",
            code="missing_library",
        ) from error
    major = int(str(library.__version__).split(".")[0])
    if major not in SUPPORTED_MAJORS[target]:
        supported = " or ".join(map(str, SUPPORTED_MAJORS[target]))
        raise DeviceError(
            f"Expected {_MODULES[target]} of major version {supported}, got {library.__version__}. "
            "Install a supported version.",
            code="unsupported_version",
        )
    return library


def unavailable_reason(target: Target) -> str | None:
    """Return why this machine cannot build for a target, as one or two sentences; None if it can."""
    try:
        load_library(target)
    except DeviceError as error:
        return str(error)
    if target == "tensorrt" and cuda_gpu() is None:
        return (
            "TensorRT builds for the GPU of the machine, but CUDA finds no GPU. "
            "Choose --target tensorrt-rtx or onnxruntime."
        )
    return None


# First version of TensorRT whose parser supports opset 22, which has BF16 convolutions.
BF16_VERSION = (10, 6)
# Lowest compute capability whose tensor cores support a data type.
MIN_CAPABILITY = {"bf16": (8, 0), "fp8": (8, 9)}


def check_options(options: BuildOptions, library: Any = None) -> None:
    """Raise DeviceError if the library or the GPU does not support the precision or an option.

    Args:
        library: TensorRT module; None imports that of the target.
    """
    trt = library or load_library(options.target)
    check_option("--optimization-level", options.optimization_level, 0, 5, DeviceError)
    if options.workspace_gib is not None and not options.workspace_gib > 0:
        raise DeviceError(
            f"Expected --workspace above 0 GiB, got {options.workspace_gib}. Correct the option.",
            code="invalid_option",
        )
    _check_target(options, trt)
    _check_precision(options, trt)
    if options.version_compatible and not hasattr(trt.BuilderFlag, "VERSION_COMPATIBLE"):
        raise DeviceError(
            f"{_MODULES[options.target]} {trt.__version__} has no version-compatible plans. "
            "Remove --version-compatible.",
            code="inapplicable_option",
        )
    _check_capability(options)


def _check_target(options: BuildOptions, trt: Any) -> None:
    """Raise DeviceError for options that the library does not have."""
    if options.target == "tensorrt-rtx":
        flags = {
            "--version-compatible": options.version_compatible,
            "--hardware-compatible": options.hardware_compatible,
        }
        given = [flag for flag, value in flags.items() if value]
        if given:
            raise DeviceError(
                f"{' and '.join(given)} is not available for --target tensorrt-rtx. Use --compute-capability instead.",
                code="inapplicable_option",
            )
        _capability_names(trt, options.compute_capabilities)
    elif options.compute_capabilities:
        raise DeviceError(
            "--compute-capability needs --target tensorrt-rtx. For TensorRT, use --hardware-compatible.",
            code="inapplicable_option",
        )


def _check_precision(options: BuildOptions, trt: Any) -> None:
    """Raise DeviceError for a precision that the library cannot build."""
    if not is_strongly_typed(trt):
        weakly_typed.check_precision(trt, options.precision)
    if options.precision == "bf16" and options.target == "tensorrt" and _version(trt) < BF16_VERSION:
        raise DeviceError(
            f"bf16 needs TensorRT {'.'.join(map(str, BF16_VERSION))} or later for opset 22, got {trt.__version__}. "
            "Choose --precision fp16, or install a later version.",
            code="precision_unsupported",
        )
    if options.precision == "fp8" and options.target == "tensorrt-rtx":
        raise DeviceError(
            "TensorRT-RTX supports fp8 for matrix products only, but this network has convolutions. "
            "Choose --precision fp16 or int8.",
            code="precision_unsupported",
        )
    if options.precision == "fp8" and options.hardware_compatible:
        raise DeviceError(
            "--hardware-compatible includes Ampere GPUs, which have no fp8. Choose --precision int8, or remove "
            "--hardware-compatible.",
            code="conflicting_options",
        )


def _check_capability(options: BuildOptions) -> None:
    """Raise DeviceError if a GPU of the build does not support the precision."""
    minimum = MIN_CAPABILITY.get(options.precision)
    if minimum is None:
        return
    gpu = cuda_gpu()
    for capability in options.compute_capabilities or ([gpu.capability] if gpu and gpu.capability else []):
        if tuple(map(int, capability.split("."))) < minimum:
            raise DeviceError(
                f"{options.precision} needs compute capability {minimum[0]}.{minimum[1]} or later, got "
                f"{capability}. Choose --precision fp16 or int8.",
                code="precision_unsupported",
            )


def _version(library: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in str(library.__version__).split(".")[:2] if part.isdigit())


def is_strongly_typed(library: ModuleType) -> bool:
    """Return whether the library supports strongly typed networks (TensorRT 10 and later)."""
    return hasattr(library.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")


def build(
    graph: bytes,
    options: BuildOptions,
    timing_cache: bytes | None = None,
    library: Any = None,
    cuda: Cuda | None = None,
) -> BuiltEngine:
    """Build a plan.

    Args:
        graph: serialized ONNX graph of a DRN model or a feature extractor, in the requested precision.
        options: builder options, with at least one profile.
        timing_cache: timing cache of an earlier build with the same GPU and version; None without one.
        library: TensorRT module; None imports that of the target.
        cuda: GPU for the inspection; None opens the first one.

    Raises:
        DeviceError: the library or a GPU is missing, or does not support the options.
        PlanNotLoaded: the library cannot load the plan that it built.
        BuildFailed: the graph was parsed, but not built; the message contains the log of the library.
        ModelFileError: the graph cannot be parsed, or the timing cache does not match.
    """
    trt = library or load_library(options.target)
    check_options(options, trt)
    logger = logger_for(trt)
    with explain_startup_failure(trt, logger, cuda_version()):
        builder = trt.Builder(logger)
    typed = is_strongly_typed(trt)
    prepared = None if typed else weakly_typed.prepare(graph)
    graph = prepared.graph if prepared else graph
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(graph):
        messages = [parser.get_error(index).desc() for index in range(parser.num_errors)] or logger.lines
        raise ModelFileError(
            f"{options.target} {trt.__version__} cannot parse the graph ({'; '.join(messages)[:500]}). "
            "Export it again with `python -m export.to_onnx`.",
            code="unparsable_graph",
        )
    config = builder.create_builder_config()
    _configure(trt, config, options)
    if prepared:
        weakly_typed.configure(trt, network, config, options.precision, prepared)
    for profile in options.profiles:
        shapes = builder.create_optimization_profile()
        for name, (smallest, best, largest) in profile.shapes.items():
            shapes.set_shape(name, smallest, best, largest)
        config.add_optimization_profile(shapes)
    cache = config.create_timing_cache(timing_cache or b"") if options.target == "tensorrt" else None
    if cache is not None and not config.set_timing_cache(cache, False):
        raise ModelFileError(
            "The timing cache is of another GPU or TensorRT version. Delete it, or choose another --timing-cache.",
            code="timing_cache_mismatch",
        )
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildFailed(
            f"{options.target} {trt.__version__} cannot build the engine ({'; '.join(logger.lines)[:500]}). "
            "Try another --precision or --optimization-level."
        )
    updated_cache = config.get_timing_cache() if cache is not None else None
    plan = bytes(plan)
    not_inspected_reason = cannot_open_reason(options)
    inspection = None
    if not not_inspected_reason:
        inspection = inspect_plan(trt, logger, plan, options.profiles, host_code=options.version_compatible, cuda=cuda)
    return BuiltEngine(
        plan,
        f"{_MODULES[options.target]} {trt.__version__}",
        typed,
        inspection,
        bytes(updated_cache.serialize()) if updated_cache else None,
        not_inspected_reason,
    )


def _network_flags(trt: Any) -> int:
    """Return the flags of a network, by name: their numbers differ between versions of TensorRT."""
    name = "STRONGLY_TYPED" if is_strongly_typed(trt) else "EXPLICIT_BATCH"
    return 1 << int(getattr(trt.NetworkDefinitionCreationFlag, name))


def _configure(trt: Any, config: Any, options: BuildOptions) -> None:
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    # Auxiliary streams take memory in each execution context.
    config.max_aux_streams = 0
    if not options.tf32:
        # "Enabled by default" (BuilderFlag::kTF32 in NvInfer.h).
        config.clear_flag(trt.BuilderFlag.TF32)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.workspace_gib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(options.workspace_gib * 2**30))
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.target == "tensorrt-rtx":
        names = _capability_names(trt, options.compute_capabilities)
        config.num_compute_capabilities = max(len(names), 1)
        for index, name in enumerate(names):
            config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
        if not names:
            config.set_compute_capability(trt.ComputeCapability.CURRENT, 0)


def _capability_names(trt: Any, capabilities: Sequence[str]) -> list[str]:
    """Return the names of compute capabilities in TensorRT-RTX; raise DeviceError for one that it does not support."""
    names = {name[2:-1] + "." + name[-1]: name for name in dir(trt.ComputeCapability) if name.startswith("SM")}
    supported = ", ".join(sorted(names, key=float))
    if not capabilities and cuda_gpu() is None:
        raise DeviceError(
            f"TensorRT-RTX needs --compute-capability on a machine without a GPU. Choose from {supported}.",
            code="missing_option",
        )
    unknown = [capability for capability in capabilities if capability not in names]
    if unknown:
        raise DeviceError(
            f"TensorRT-RTX {trt.__version__} does not support compute capability {', '.join(unknown)}. "
            f"Choose --compute-capability from {supported}.",
            code="unsupported_compute_capability",
        )
    return [names[capability] for capability in capabilities]


@contextlib.contextmanager
def wrap_library_errors(action: str) -> Iterator[None]:
    """Raise an exception of a library as ModelFileError; `action` is the subject of the message."""
    try:
        yield
    except GroundingError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        raise ModelFileError(
            f"{action} failed ({str(error).splitlines()[0] if str(error) else type(error).__name__}). "
            "Check the versions with `python -m runtime.doctor`.",
            code="gpu_call_failed",
        ) from error
