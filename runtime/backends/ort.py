"""The network in ONNX Runtime, on a CPU or a CUDA GPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import DeviceError, ModelFileError, ShapeError
from runtime.manifest import METADATA_KEY, Manifest
from runtime.tensors import Batch, Heads

if TYPE_CHECKING:
    from runtime.backends import Device

OUTPUTS = ["matching_logits", "boundary_distances", "iou_logits"]
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxRuntimeBackend:
    """A `.onnx` file exported by this toolkit.

    Raises:
        ModelFileError: the file is not such a graph.
        DeviceError: ONNX Runtime is not installed, or a GPU was asked for that it does not have.
    """

    def __init__(self, path: str | os.PathLike[str], device: Device = "auto", threads: int | None = None) -> None:
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise DeviceError(
                "ONNX Runtime is not installed; run `pip install 'drn-deploy[cpu]'`, or `'drn-deploy[gpu]'` for a "
                "CUDA GPU (one of them: both own the same folder)."
            ) from error
        available = ort.get_available_providers()
        if device == "auto":
            device = "cuda" if PROVIDERS["cuda"] in available else "cpu"
        if PROVIDERS[device] not in available:
            raise DeviceError(
                f"A {device} device was asked for and this ONNX Runtime {ort.__version__} offers "
                f"{', '.join(available)}; "
                "install 'drn-deploy[gpu]' in place of 'drn-deploy[cpu]', or pass --device cpu."
            )
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        path = Path(path)
        try:
            session = ort.InferenceSession(str(path), options, providers=[PROVIDERS[device]])
        # ONNX Runtime's exceptions share no base class below Exception.
        except Exception as error:
            first_line = str(error).splitlines()[0]
            raise ModelFileError(
                f"{path} is not an ONNX model that ONNX Runtime {ort.__version__} can open ({first_line}); "
                "export it again."
            ) from error
        # A GPU session falls back to the CPU without a word when a CUDA library is missing.
        if PROVIDERS[device] not in session.get_providers():
            raise DeviceError(
                f"ONNX Runtime could not start its {PROVIDERS[device]}, usually because a CUDA or cuDNN library is "
                "missing; run `python -m runtime.doctor`, or pass --device cpu."
            )
        self.device = device
        self.manifest = Manifest.from_json(
            session.get_modelmeta().custom_metadata_map.get(METADATA_KEY), source=str(path)
        )
        inputs = {argument.name for argument in session.get_inputs()}
        outputs = {argument.name for argument in session.get_outputs()}
        missing = (set(Batch.__dataclass_fields__) - inputs) | (set(OUTPUTS) - outputs)
        if missing:
            raise ModelFileError(
                f"{path} lacks {', '.join(sorted(missing))}, so it is not a DRN graph of ours; export it again."
            )
        self._session = session

    def run(self, batch: Batch) -> Heads:
        """Return the heads of a batch.

        Raises:
            ShapeError: the arrays do not fit the graph.
        """
        try:
            return Heads(*self._session.run(OUTPUTS, vars(batch)))
        except Exception as error:
            if type(error).__module__.startswith("onnxruntime"):
                raise ShapeError(f"The model does not take this batch: {str(error).splitlines()[0]}.") from error
            raise
