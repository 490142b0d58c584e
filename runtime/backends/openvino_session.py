"""Open ONNX files and graphs in OpenVINO on a CPU, as sessions with the methods of ONNX Runtime's."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from runtime.artifacts.onnx_metadata import Content, DigestCheck
from runtime.backends.batch_shapes import AXES
from runtime.core.errors import DeviceError, ShapeError, importing

if TYPE_CHECKING:
    from runtime.backends.base import Device

_TELEMETRY = "openvino_telemetry"
# OpenVINO's element types as ONNX Runtime names them, and those in NumPy.
_TYPES = {"f32": "tensor(float)", "f16": "tensor(float16)", "i32": "tensor(int32)"}
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int32)": np.int32}
_MISSING = np.empty((), np.void)


def import_openvino() -> Any:
    """Import OpenVINO without its telemetry, which reports every import to Intel unless the user opted out.

    OpenVINO imports `openvino_telemetry` if it can (openvino/tools/ovc/telemetry_utils.py).

    Raises:
        DeviceError: OpenVINO is not installed.
    """
    # None makes `import openvino_telemetry` fail, as if it were not installed.
    hidden = sys.modules.setdefault(_TELEMETRY, None)  # type: ignore[arg-type]
    try:
        with importing("OpenVINO", "openvino", ", or build the model with --target onnxruntime"):
            import openvino
    finally:
        if hidden is None:
            # Another thread may have removed it.
            sys.modules.pop(_TELEMETRY, None)
    return openvino


class _SignalStack(ctypes.Structure):
    """`stack_t` of Linux's sigaltstack(2)."""

    _fields_ = [("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


@contextlib.contextmanager
def preserved_signal_stack() -> Iterator[None]:
    """Restore the signal stack of this thread at the end.

    OpenVINO's CPU plugin sets one and frees its memory with the last model. After that, every signal that has a Python
    handler, such as Ctrl-C, would end the process by SIGSEGV (2026.4.1 on Linux).
    """
    if sys.platform != "linux":
        yield
        return
    library, before = ctypes.CDLL(None), _SignalStack()
    library.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        library.sigaltstack(ctypes.byref(before), None)


class Argument(NamedTuple):
    """An input or output: name, type as ONNX Runtime names it, and shape with None for dynamic axes."""

    name: str
    type: str
    shape: tuple[int | None, ...]


class OpenVinoSession:
    """A graph compiled by OpenVINO for the CPU. Threads may share it; it runs one call at a time.

    Args:
        source: path of an ONNX file, or a serialized graph.
        threads: CPU threads; all cores when None.

    Raises:
        DeviceError: OpenVINO is not installed.
        RuntimeError: OpenVINO cannot read or compile the graph.
    """

    def __init__(self, source: str | bytes, threads: int | None = None) -> None:
        core = import_openvino().Core()
        config: dict[str, Any] = {
            # The default on CPUs with AMX or AVX512-BF16 is BF16.
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            # Where it can, OpenVINO quantizes the inputs of matrix products whose weights are INT8.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
            # Processes that share a machine would pin their threads to the same cores.
            "ENABLE_CPU_PINNING": False,
        }
        if threads is not None:
            config["INFERENCE_NUM_THREADS"] = threads
        with preserved_signal_stack():
            compiled = core.compile_model(core.read_model(source), "CPU", config)
        self._inputs, self._outputs = (
            [_argument(port) for port in ports] for ports in (compiled.inputs, compiled.outputs)
        )
        names = {entry.name for entry in self._inputs}
        self._axes = next((axes for axes in AXES.values() if axes.keys() == names), {})
        self._request = compiled.create_infer_request()
        self._lock = threading.Lock()

    def get_inputs(self) -> list[Argument]:
        """Return the inputs of the graph."""
        return self._inputs

    def get_outputs(self) -> list[Argument]:
        """Return the outputs of the graph."""
        return self._outputs

    def run(self, outputs: Sequence[str] | None, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Run the graph.

        Args:
            outputs: names of the outputs to return; all when None.
            feed: array of each input by name.

        Raises:
            ShapeError: an input is missing, or has another type or shape.
        """
        self._check(feed)
        with self._lock:
            # Outputs are copied, because the next call overwrites them.
            results = self._request.infer(dict(feed), share_inputs=True, share_outputs=False)
            values = dict(zip((entry.name for entry in self._outputs), results.values()))
        return [values[name] for name in outputs or values]

    def _check(self, feed: Mapping[str, np.ndarray]) -> None:
        """Raise ShapeError for inputs that OpenVINO would convert, broadcast, or take from the previous call."""
        sizes: dict[str, int] = {}
        for name, kind, expected in self._inputs:
            array = feed.get(name, _MISSING)
            fits = array.dtype == _DTYPES.get(kind) and array.ndim == len(expected)
            fits = fits and all(size in (None, given) for size, given in zip(expected, array.shape))
            axes = zip(self._axes.get(name, ()), array.shape)
            if not fits or any(sizes.setdefault(axis, size) != size for axis, size in axes):
                raise ShapeError(
                    f"Expected {kind} of shape {expected} for {name}, with None for any size and equal sizes of the "
                    f"axes {sizes}, got {array.dtype} of shape {array.shape}. Correct the input."
                )


def create_session(path: Path, device: Device = "auto", threads: int | None = None) -> tuple[Any, Device, Content]:
    """Open an ONNX file and check its digest; see `runtime.backends.onnxruntime_session.create_session`.

    Raises:
        ModelFileError: OpenVINO cannot open the file, or the file does not match its recorded digest.
        DeviceError: OpenVINO is not installed, or a GPU is requested.
    """
    if device not in ("auto", "cpu"):
        raise DeviceError(
            f"{path.name} was built for OpenVINO on a CPU, got --device {device}. Pass --device cpu, or build the "
            "model for another --target.",
            code="gpu_unavailable",
        )
    openvino = import_openvino()
    checked = DigestCheck(path)
    # OpenVINO's exceptions are RuntimeErrors.
    with checked.opening(f"OpenVINO {openvino.__version__}", "Build the model again.", RuntimeError):
        session = OpenVinoSession(str(path), threads)
    return session, "cpu", checked.result()


def _argument(port: Any) -> Argument:
    shape = tuple(axis.get_length() if axis.is_static else None for axis in port.get_partial_shape())
    kind = port.get_element_type().get_type_name()
    return Argument(port.get_any_name(), _TYPES.get(kind, kind), shape)
