"""Open ONNX files and graphs in ONNX Runtime, on a CPU or a CUDA GPU."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.artifacts.onnx_metadata import Content, DigestCheck, raw_manifest
from runtime.backends.exact_int8 import source_for_cpu
from runtime.core.errors import DeviceError

if TYPE_CHECKING:
    from runtime.backends.base import Device

# On a CPU a convolution with padding of its own is slower (`calib.graph.conv_padding`), so Pad nodes are not fused.
DISABLED_OPTIMIZERS = ["Pad_Fusion"]
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def import_onnxruntime(gpu: bool) -> tuple[Any, str]:
    """Import ONNX Runtime and, for a GPU, preload the CUDA and cuDNN libraries of NVIDIA's wheels.

    Args:
        gpu: whether the session may run on a GPU. ONNX Runtime does not search the wheels that
            `onnxruntime-gpu[cuda,cudnn]` and torch install.

    Returns:
        The module, and the libraries that it could not load, as it prints them; empty on a CPU.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise DeviceError(
            "ONNX Runtime is not installed. Run `pip install '.[cpu]'` in the drn-deploy directory, or `'.[gpu]'` for "
            "a CUDA GPU; never both, because they share a folder.",
            code="missing_library",
        ) from error
    # Added in 1.21; has no effect in a build for CPUs.
    if not gpu or not hasattr(ort, "preload_dlls"):
        return ort, ""
    # `preload_dlls` prints the libraries that it cannot load, but stdout is for results.
    with contextlib.redirect_stdout(io.StringIO()):
        for folder in _cuda_folders(Path(ort.__file__)):
            ort.preload_dlls(directory=str(folder))
    with contextlib.redirect_stdout(io.StringIO()) as output:
        # Libraries loaded above are resolved by name.
        ort.preload_dlls()
    return ort, " ".join(output.getvalue().split())


def _cuda_folders(ort: Path) -> list[Path]:
    """Return the folders with CUDA libraries of NVIDIA's wheels that ONNX Runtime does not search.

    `preload_dlls()` searches the site-packages directory of ONNX Runtime only ("nvidia site packages" in
    onnxruntime/__init__.py); with `directory` it searches that one folder.
    """
    spec = importlib.util.find_spec("nvidia")
    packages = map(Path, spec.submodule_search_locations or ()) if spec else ()
    return [
        folder
        for package in packages
        if package.resolve().parent != ort.resolve().parent.parent
        for folder in sorted((*package.glob("*/lib"), *package.glob("*/bin"), *package.glob("*/bin/*")))
        if folder.is_dir()
    ]


def new_session(
    source: str | bytes,
    threads: int | None = None,
    *,
    optimize: bool = True,
    provider: Any = PROVIDERS["cpu"],
) -> Any:
    """Create an ONNX Runtime session.

    Args:
        source: path of an ONNX file, or a serialized graph.
        provider: name of the execution provider, or its name and options.

    Raises:
        Exception: ONNX Runtime cannot open the graph; the class is one of its own.
    """
    ort, _ = import_onnxruntime(gpu=False)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if threads is not None:
        options.intra_op_num_threads = threads
    disabled = DISABLED_OPTIMIZERS if provider == PROVIDERS["cpu"] else None
    return ort.InferenceSession(source, options, providers=[provider], disabled_optimizers=disabled)


def create_session(path: Path, device: Device = "auto", threads: int | None = None) -> tuple[Any, Device, Content]:
    """Open an ONNX file of any kind and check its digest.

    The file is hashed in a thread while ONNX Runtime optimizes the graph, which takes longer.

    Args:
        device: `auto` selects a GPU if ONNX Runtime supports one, otherwise the CPU.

    Returns:
        The session, the device that it runs on, and the hashes of the file.

    Raises:
        ModelFileError: ONNX Runtime cannot open the file, or the file does not match its recorded digest.
        DeviceError: ONNX Runtime is not installed, or does not support the device.
    """
    ort, missing_libraries = import_onnxruntime(gpu=device != "cpu")
    available = ort.get_available_providers()
    if device == "auto":
        device = "cuda" if PROVIDERS["cuda"] in available else "cpu"
    if PROVIDERS.get(device) not in available:
        raise DeviceError(
            f"Expected ONNX Runtime with {device} support, got {ort.__version__} with {', '.join(available)}. Install "
            "'.[gpu]' in place of '.[cpu]', or pass --device cpu.",
            code="gpu_unavailable",
        )
    checked = DigestCheck(path)
    # ONNX Runtime's exceptions have no common base class below Exception.
    with checked.opening(f"ONNX Runtime {ort.__version__}", "Export the model again.", Exception):
        if device == "cpu":
            session = new_session(source_for_cpu(path), threads)
        else:
            session = new_session(str(path), threads, provider=(PROVIDERS[device], _cuda_options(path)))
    # Without a CUDA library, ONNX Runtime uses the CPU and reports no error.
    if PROVIDERS[device] not in session.get_providers():
        raise DeviceError(
            f"ONNX Runtime could not start {PROVIDERS[device]}; missing CUDA or cuDNN libraries: "
            f"{missing_libraries.rstrip('.') or 'not reported'}. Run `pip install 'onnxruntime-gpu[cuda,cudnn]'`, or "
            "pass --device cpu.",
            code="gpu_unavailable",
        )
    return session, device, checked.result()


def _cuda_options(path: Path) -> dict[str, str]:
    """Return the options of the CUDA provider for an ONNX file.

    ONNX Runtime enables TF32 by default (`use_tf32`), which is not FP32; only models exported with --tf32 allow it. By
    default it also searches convolutions exhaustively at each new shape (`cudnn_conv_algo_search`). Source:
    onnxruntime.ai, CUDA-ExecutionProvider.
    """
    tf32 = False
    with contextlib.suppress(AttributeError):
        tf32 = raw_manifest(path).get("training", {}).get("precision", {}).get("tf32") is True
    return {"use_tf32": str(int(tf32)), "cudnn_conv_algo_search": "HEURISTIC"}
