"""`python -m runtime.doctor`: report which parts of the toolkit this machine can run."""

from __future__ import annotations

import dataclasses
import platform
import subprocess
import sys

from runtime.backends.exact_int8 import saturates
from runtime.backends.onnxruntime_session import import_onnxruntime
from runtime.backends.openvino_session import import_openvino
from runtime.core import cpu_info
from runtime.core.cli import command, suggest_next_command
from runtime.core.errors import DeviceError
from runtime.core.gpu_info import list_gpus
from runtime.core.packages import installed_version


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        subject: what was checked.
        works: whether it works.
        details: versions, or the reason of the failure.
        remedy: command or advice that repairs it.
    """

    subject: str
    works: bool
    details: str
    remedy: str = ""


def doctor() -> list[Finding]:
    """Report which parts of the toolkit work on this machine, and how to install the others."""
    findings = [
        _python(),
        _cpu(),
        _cpu_int8(),
        *gpus(),
        _onnxruntime(),
        _openvino(),
        _torch(),
        _exporter(),
        _tensorrt(),
        _packages("quantize, build engines", "engine", "onnx", "polygraphy", "jinja2"),
        _tensorrt_rtx(),
        _packages("plots", "plot", "matplotlib"),
        _videos(),
        _packages("read HDF5 features", "hdf5", "h5py"),
        _packages("serve over HTTP", "serve", "fastapi", "uvicorn", "h11", "python-multipart", "prometheus-client"),
        _packages("ground a corpus", "corpus", "ray", "pyarrow"),
        _packages("query a Triton server", "triton", "tritonclient"),
    ]
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        print(f"{'yes' if finding.works else 'no ':<4}{finding.subject:<{width}}  {finding.details}")
        if finding.remedy:
            print(f"{'':<{width + 4}}  -> {finding.remedy}")
    suggest_next_command("train.simulate", "--output", "data/simulated")
    return findings


def _python() -> Finding:
    cores = cpu_info.cores()
    return Finding("this machine", True, f"Python {platform.python_version()}, {platform.machine()}, {cores} CPU cores")


def _cpu() -> Finding:
    features = cpu_info.cpu_features()
    listed = "features unknown" if features is None else ", ".join(features) or "none of the relevant features"
    return Finding("CPU", True, f"{cpu_info.cpu_name()}: {listed}")


def _cpu_int8() -> Finding:
    kind = "uint8 weights, because without VNNI sums of int8 weights saturate" if saturates() else "int8 weights"
    return Finding("INT8 on this CPU", True, f"ONNX Runtime computes with {kind}")


def gpus() -> list[Finding]:
    """Return name, driver, memory and compute capability of every GPU that nvidia-smi reports."""
    try:
        return [Finding("NVIDIA GPU", True, str(gpu)) for gpu in list_gpus()]
    except DeviceError as error:
        return [Finding("NVIDIA GPU", False, str(error))]


def _onnxruntime() -> Finding:
    subject = "run .onnx models"
    both = [name for name in ("onnxruntime", "onnxruntime-gpu") if installed_version(name)]
    if len(both) == 2:
        remedy = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install '.[cpu]'  (or [gpu])"
        return Finding(
            subject, False, "onnxruntime and onnxruntime-gpu are both installed and overwrite each other", remedy
        )
    try:
        import onnxruntime
    except ImportError as error:
        return Finding(subject, False, f"ONNX Runtime cannot be imported: {error}", "pip install '.[cpu]'  (or [gpu])")
    import_onnxruntime(gpu=True)
    providers = ", ".join(name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers())
    return Finding(subject, True, f"ONNX Runtime {onnxruntime.__version__} with {providers}")


def _openvino() -> Finding:
    subject = "run .onnx models for OpenVINO"
    try:
        openvino = import_openvino()
    except DeviceError as error:
        return Finding(subject, False, f"OpenVINO cannot be imported: {error.__cause__}", "pip install '.[openvino]'")
    return Finding(subject, True, f"OpenVINO {openvino.__version__}")


def _torch() -> Finding:
    subject = "train, run .pt models"
    version = installed_version("torch")
    if version is None:
        return Finding(subject, False, "torch is not installed", "pip install '.[train]'")
    # `runtime` must not import torch, so another process does it.
    code = "import torch; print(torch.cuda.is_available(), torch.version.cuda)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if result.returncode:
        lines = result.stderr.strip().splitlines()
        return Finding(subject, False, f"torch {version} cannot be imported: {lines[-1] if lines else 'no message'}")
    available, cuda = result.stdout.split()
    return Finding(subject, True, f"torch {version}, " + (f"CUDA {cuda}" if available == "True" else "CPU only"))


def _exporter() -> Finding:
    missing = [name for name in ("torch", "onnx", "onnxscript", "onnxruntime") if installed_version(name) is None]
    missing = [name for name in missing if name != "onnxruntime" or installed_version("onnxruntime-gpu") is None]
    if missing:
        return Finding("export to ONNX", False, f"not installed: {', '.join(missing)}", "pip install '.[export]'")
    return Finding(
        "export to ONNX", True, f"onnx {installed_version('onnx')}, onnxscript {installed_version('onnxscript')}"
    )


def _tensorrt() -> Finding:
    subject = "TensorRT"
    names = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-lean")
    version = next((f"{name} {installed_version(name)}" for name in names if installed_version(name)), None)
    if version is None:
        remedy = (
            "pip install tensorrt  (the wheels of 10 and 11 on PyPI download their libraries from NVIDIA's index; "
            "without access to it, use NVIDIA's container or package)"
        )
        return Finding(subject, False, "not installed", remedy)
    from runtime.backends.cuda_driver import Cuda

    try:
        # By CUDA's driver, because TensorRT itself may crash without a GPU.
        gpu = Cuda()
    except DeviceError as error:
        return Finding(subject, False, f"{version} is installed, but needs a GPU to build and run engines", str(error))
    details = f"{version} builds and runs engines on {gpu.name} ({gpu.capability}), CUDA {gpu.driver}"
    return Finding(subject, True, details)


def _tensorrt_rtx() -> Finding:
    version = installed_version("tensorrt-rtx-cu13") or installed_version("tensorrt-rtx")
    if version is None:
        return Finding("TensorRT-RTX", False, "not installed", "pip install '.[rtx]'")
    details = f"{version}: builds engines on a CPU or GPU, and runs them on an RTX GPU"
    return Finding("TensorRT-RTX", True, details)


def _packages(subject: str, extra: str, *distributions: str) -> Finding:
    """Return whether packages are installed, and the extra that installs them."""
    versions = {name: installed_version(name) for name in distributions}
    missing = [name for name, version in versions.items() if version is None]
    if missing:
        return Finding(subject, False, f"not installed: {', '.join(missing)}", f"pip install '.[{extra}]'")
    return Finding(subject, True, ", ".join(f"{name} {version}" for name, version in versions.items()))


def _videos() -> Finding:
    subject = "read video files"
    version = installed_version("av")
    if version is None:
        return Finding(subject, False, "PyAV is not installed", "pip install '.[video]'")
    try:
        import av
    except ImportError as error:
        return Finding(subject, False, f"PyAV {version} cannot be imported: {error}", "pip install '.[video]'")
    codecs = [name for name in ("h264", "hevc", "vp9", "av1") if name in av.codecs_available]
    return Finding(subject, True, f"PyAV {version} decodes {', '.join(codecs)} and {len(av.codecs_available)} more")


if __name__ == "__main__":
    command(doctor)
