"""ONNX graphs become TensorRT plans: one path for TensorRT 8.6, 10, 11 and TensorRT-RTX.

Precision is in the graph, which is built strongly typed; for TensorRT 8.6 see `export.engine.weakly_typed`. What a
build will do is a value, `BuildOptions`; this module only carries it out.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib
import logging
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal

from export.engine import weakly_typed
from export.engine.inspector import inspect_plan
from export.engine.profiles import Profile
from runtime.artifacts.engine_layers import Inspection
from runtime.backends.cuda_driver import Cuda
from runtime.backends.tensorrt_logger import explain_startup_failure, logger_for
from runtime.core.errors import DeviceError, GroundingError, ModelFileError

log = logging.getLogger("drn")

Target = Literal["tensorrt", "tensorrt-rtx"]

_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_WAYS_OUT = {
    "tensorrt": "install TensorRT (10 and 11 come from NVIDIA's own index; 8.6 from PyPI for Python 3.10 and older)",
    "tensorrt-rtx": "run `pip install '.[rtx]'` in the drn-deploy directory",
}
SUPPORTED_MAJORS = {"tensorrt": (8, 10, 11), "tensorrt-rtx": (1,)}


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """The options of an engine build. The defaults are those of TensorRT.

    Attributes:
        target: which library builds.
        precision: fp32, fp16, bf16, int8 or fp8: what the graph is in.
        profiles: optimization profiles, at least one.
        optimization_level: 0 to 5, how long to look for fast kernels.
        workspace_gib: most scratch memory on the device.
        version_compatible: a plan that later versions of the same major can load.
        hardware_compatible: a plan that runs on Ampere and later, not only on the GPU it was built on.
        compute_capabilities: for TensorRT-RTX, as "8.6"; the GPU of this machine when empty.
        tf32: whether FP32 may be computed in TF32, with 10 bits of mantissa.
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
    """A built engine and what is known of it.

    Attributes:
        plan: the bytes that TensorRT deserialises.
        library: name and version of what built it.
        strongly_typed: whether the graph alone decided the precision.
        inspection: what the engine inspector wrote; None where the plan cannot be opened here.
        timing_cache: measured kernel times, for the next build.
        why_not_inspected: the reason where there is no inspection, as a clause.
    """

    plan: bytes
    library: str
    strongly_typed: bool
    inspection: Inspection | None
    timing_cache: bytes | None
    why_not_inspected: str = ""


class BuildFailed(ModelFileError):
    """The graph parses, but the library finds no way to build an engine of it."""

    code = "build_failed"


def cuda_version() -> str | None:
    """Return the CUDA version of the driver, as 13.0; None without one."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if cuda.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def compute_capability() -> tuple[int, int] | None:
    """Return the compute capability of the first GPU, as (9, 0); None without one."""
    if not cuda_devices():
        return None
    cuda = ctypes.CDLL("libcuda.so.1")
    device, numbers = ctypes.c_int(), [ctypes.c_int(), ctypes.c_int()]
    cuda.cuDeviceGet(ctypes.byref(device), 0)
    # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
    for attribute, number in zip((75, 76), numbers):
        cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
    return numbers[0].value, numbers[1].value


def cuda_devices() -> int:
    """Return how many GPUs CUDA offers; 0 without a driver. The driver itself is asked: TensorRT dies without it."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def why_not_here(options: BuildOptions) -> str:
    """Return why a plan of these options cannot be opened on this machine, as a clause; empty if it can.

    TensorRT builds on the GPU that it builds for. TensorRT-RTX also builds for GPUs that are not here: such a plan is
    refused when it is loaded ("The engine cannot run on this GPU, which has compute capability", in libtensorrt_rtx.so
    of 1.7.1).
    """
    if options.target == "tensorrt":
        return ""
    here = compute_capability()
    if here is None:
        return "no GPU is here to open the plan"
    text = f"{here[0]}.{here[1]}"
    if options.compute_capabilities and text not in options.compute_capabilities:
        built_for = ", ".join(options.compute_capabilities)
        return f"the plan is for compute capability {built_for}, and this machine's GPU has {text}"
    return ""


def runs_here(options: BuildOptions) -> bool:
    """Return whether a plan of these options runs on this machine."""
    return bool(cuda_devices()) and not why_not_here(options)


def load_library(target: Target) -> ModuleType:
    """Import TensorRT or TensorRT-RTX.

    Raises:
        DeviceError: it is not installed, cannot be loaded, or is of a version whose API is not known here.
    """
    try:
        library = importlib.import_module(_MODULES[target])
    except ImportError as error:
        raise DeviceError(
            f"The target {target} needs {_MODULES[target]}, which cannot be imported ({error}); {_WAYS_OUT[target]}.",
            code="missing_library",
        ) from error
    major = int(str(library.__version__).split(".")[0])
    if major not in SUPPORTED_MAJORS[target]:
        known = ", ".join(map(str, SUPPORTED_MAJORS[target]))
        raise DeviceError(
            f"{_MODULES[target]} {library.__version__} is installed, and majors {known} are known here; "
            "install one of them."
        )
    return library


def unavailable_reason(target: Target) -> str | None:
    """Return why this machine cannot build for a target, in one sentence; None if it can."""
    try:
        load_library(target)
    except DeviceError as error:
        return str(error)
    if target == "tensorrt" and not cuda_devices():
        return (
            "TensorRT builds on the GPU that it builds for, and CUDA finds none here; "
            "use --target tensorrt-rtx or onnxruntime."
        )
    return None


# TensorRT's parser reads opset 22, which has BF16 convolutions, from 10.6 on.
BF16_VERSION = (10, 6)
# Compute capability from which tensor cores multiply in a type; below it no engine has it.
MIN_CAPABILITY = {"bf16": (8, 0), "fp8": (8, 9)}


def check_options(options: BuildOptions, library: Any = None) -> None:
    """Raise DeviceError where library, GPU, precision and options do not go together; nothing is built."""
    trt = library or load_library(options.target)
    if options.optimization_level is not None and not 0 <= options.optimization_level <= 5:
        raise DeviceError(
            f"--optimization-level is 0 to 5, and {options.optimization_level} was given.", code="invalid_option"
        )
    if options.workspace_gib is not None and not options.workspace_gib > 0:
        raise DeviceError(
            f"--workspace is GiB of scratch memory, more than 0, and {options.workspace_gib} was given.",
            code="invalid_option",
        )
    _check_target(options, trt)
    _check_precision(options, trt)
    if options.version_compatible and not hasattr(trt.BuilderFlag, "VERSION_COMPATIBLE"):
        raise DeviceError(
            f"{_MODULES[options.target]} {trt.__version__} has no version-compatible plans; leave "
            "--version-compatible out.",
            code="inapplicable_option",
        )
    _check_capability(options)


def _check_target(options: BuildOptions, trt: Any) -> None:
    """Raise DeviceError for options of the other library."""
    if options.target == "tensorrt-rtx":
        flags = {
            "--version-compatible": options.version_compatible,
            "--hardware-compatible": options.hardware_compatible,
        }
        refused = [flag for flag, given in flags.items() if given]
        if refused:
            raise DeviceError(
                f"{' and '.join(refused)}: of TensorRT, not of TensorRT-RTX; name the GPUs with --compute-capability.",
                code="inapplicable_option",
            )
        _known_capabilities(trt, options.compute_capabilities)
    elif options.compute_capabilities:
        raise DeviceError(
            "--compute-capability is for --target tensorrt-rtx; TensorRT builds for the GPU it runs on "
            "(--hardware-compatible makes a plan for Ampere and later).",
            code="inapplicable_option",
        )


def _check_precision(options: BuildOptions, trt: Any) -> None:
    """Raise DeviceError for a precision that the library cannot build."""
    if not is_strongly_typed(trt):
        weakly_typed.check_precision(trt, options.precision)
    if options.precision == "bf16" and options.target == "tensorrt" and _version(trt) < BF16_VERSION:
        raise DeviceError(
            f"{_MODULES[options.target]} {trt.__version__} cannot read a bf16 graph, whose opset 22 TensorRT's parser "
            f"reads from {'.'.join(map(str, BF16_VERSION))} on; install that, or use fp16.",
            code="precision_unsupported",
        )
    if options.precision == "fp8" and options.target == "tensorrt-rtx":
        raise DeviceError(
            "TensorRT-RTX documents fp8 for matrix products only, and this network is made of convolutions; "
            "use fp16 or int8.",
            code="precision_unsupported",
        )
    if options.precision == "fp8" and options.hardware_compatible:
        raise DeviceError(
            "--hardware-compatible makes a plan for Ampere and later, and Ampere has no fp8; use int8, or leave "
            "--hardware-compatible out.",
            code="conflicting_options",
        )


def _check_capability(options: BuildOptions) -> None:
    """Raise DeviceError if a GPU that is built for cannot multiply in the precision."""
    minimum = MIN_CAPABILITY.get(options.precision)
    if minimum is None:
        return
    here = compute_capability()
    built_for = [here] if here else []
    if options.compute_capabilities:
        parts = (text.partition(".") for text in options.compute_capabilities)
        built_for = [(int(major), int(minor)) for major, _, minor in parts]
    for capability in built_for:
        if capability < minimum:
            raise DeviceError(
                f"{options.precision} needs a GPU of compute capability {minimum[0]}.{minimum[1]} or later, and "
                f"{capability[0]}.{capability[1]} was asked for; use fp16 or int8.",
                code="precision_unsupported",
            )


def _version(library: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in str(library.__version__).split(".")[:2] if part.isdigit())


def is_strongly_typed(library: ModuleType) -> bool:
    """Return whether the library can take precision from the graph alone (TensorRT 10 and later)."""
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
        graph: a serialized ONNX graph of ours, in the precision requested.
        options: what to do.
        timing_cache: of an earlier build on the same GPU and version.
        library: stands in for the TensorRT module.
        cuda: stands in for the GPU on which the plan is inspected.

    Raises:
        DeviceError: the library or the GPU is missing, or the options do not go with it.
        PlanNotLoaded: the library refuses the plan that it built.
        BuildFailed: the graph parses, but does not build; the library's own words are in the message.
        ModelFileError: the graph does not parse.
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
            f"{options.target} {trt.__version__} cannot parse the graph: {'; '.join(messages)[:500]}.",
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
            "The timing cache is of another GPU or TensorRT version; delete it or name another file.",
            code="timing_cache_mismatch",
        )
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildFailed(
            f"{options.target} {trt.__version__} cannot build the engine: {'; '.join(logger.lines)[:500]}."
        )
    retained = config.get_timing_cache() if cache is not None else None
    plan = bytes(plan)
    elsewhere = why_not_here(options)
    inspection = None
    if not elsewhere:
        inspection = inspect_plan(trt, logger, plan, options.profiles, host_code=options.version_compatible, cuda=cuda)
    return BuiltEngine(
        plan,
        f"{_MODULES[options.target]} {trt.__version__}",
        typed,
        inspection,
        bytes(retained.serialize()) if retained else None,
        elsewhere,
    )


def _network_flags(trt: Any) -> int:
    """Names only: the integers behind them moved between versions."""
    flags = trt.NetworkDefinitionCreationFlag
    expected = "STRONGLY_TYPED" if is_strongly_typed(trt) else "EXPLICIT_BATCH"
    return 1 << int(getattr(flags, expected))


def _configure(trt: Any, config: Any, options: BuildOptions) -> None:
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    # Each context would have streams, and memory, of its own for them.
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
        _choose_capabilities(trt, config, options.compute_capabilities)


def _known_capabilities(trt: Any, expected: Sequence[str]) -> dict[str, str]:
    """Return what TensorRT-RTX calls the compute capabilities it builds for; DeviceError if `wanted` holds others."""
    known = {name[2:-1] + "." + name[-1]: name for name in dir(trt.ComputeCapability) if name.startswith("SM")}
    offered = ", ".join(sorted(known, key=float))
    if not expected and not cuda_devices():
        raise DeviceError(
            f"Without a GPU, TensorRT-RTX must be told which one to build for; pass --compute-capability ({offered}).",
            code="missing_option",
        )
    unknown = [capability for capability in expected if capability not in known]
    if unknown:
        raise DeviceError(
            f"TensorRT-RTX {trt.__version__} builds for compute capabilities {offered}, and "
            f"{', '.join(unknown)} was asked for.",
            code="unsupported_compute_capability",
        )
    return known


def _choose_capabilities(trt: Any, config: Any, expected: Sequence[str]) -> None:
    known = _known_capabilities(trt, expected)
    config.num_compute_capabilities = max(len(expected), 1)
    for index, capability in enumerate(expected):
        config.set_compute_capability(getattr(trt.ComputeCapability, known[capability]), index)
    if not expected:
        config.set_compute_capability(trt.ComputeCapability.CURRENT, 0)


@contextlib.contextmanager
def wrap_library_errors(doing: str) -> Any:
    """Turn what a library throws into one sentence of ours."""
    try:
        yield
    except GroundingError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        raise ModelFileError(
            f"{doing} failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}."
        ) from error
