"""Test `runtime.backends.open_backend` and `onnxruntime_session`: devices, options of sessions, and errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.backends import open_backend
from runtime.backends.base import Device
from runtime.backends.onnxruntime_session import import_onnxruntime
from runtime.core.batch import Batch
from runtime.core.errors import DeviceError, DeviceMemoryError, ModelFileError, ShapeError, is_out_of_memory
from tests.raising import raises


@pytest.mark.parametrize("threads", [0, -3, 1_000_000])
def test_invalid_thread_count_is_rejected(tiny_model: Path, threads: int) -> None:
    with raises(DeviceError, "invalid_option", "--threads", threads):
        open_backend(tiny_model, "cpu", threads)


def test_requested_gpu_without_cuda_raises_error(tiny_model: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    with raises(DeviceError, "gpu_unavailable", "cuda", "--device cpu"):
        open_backend(tiny_model, "cuda")


@pytest.mark.parametrize("device", ["auto", "cuda", "cpu"])
def test_nvidia_wheel_cuda_is_loaded_before_gpu_detection(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], device: Device
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    offered = ["CPUExecutionProvider"]

    def preload(**_: Any) -> None:
        print("Failed to load libcudnn.so.9: no such file.")
        offered.append("CUDAExecutionProvider")

    monkeypatch.setattr(onnxruntime, "preload_dlls", preload, raising=False)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: offered)
    if device == "cpu":
        open_backend(tiny_model, device)
        assert offered == ["CPUExecutionProvider"]
    else:
        # Offered, but it does not start: what was not found is in the error.
        with raises(DeviceError, "gpu_unavailable", "CUDAExecutionProvider", "libcudnn.so.9"):
            open_backend(tiny_model, device)
    assert capsys.readouterr().out == ""


def test_cuda_libraries_are_loaded_from_any_nvidia_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    # As NVIDIA's wheels: CUDA 13 in one folder, cuDNN in another, and neither beside ONNX Runtime.
    for folder in ("nvidia/cu13/lib", "nvidia/cudnn/lib", "nvidia/cudnn/include"):
        (tmp_path / folder).mkdir(parents=True)
    given: list[str | None] = []
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda directory=None: given.append(directory), raising=False)
    import_onnxruntime(gpu=True)
    # Last of all as it comes: that says what is missing still.
    assert given == [str(tmp_path / "nvidia/cu13/lib"), str(tmp_path / "nvidia/cudnn/lib"), None]


@pytest.mark.parametrize("words", [
    "CUDA failure 2: out of memory ; GPU=0", "Failed to allocate memory for requested buffer", "std::bad_alloc",
    "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED", "cudaErrorMemoryAllocation", "CUDA error: out of memory",
    "CUDA_ERROR_OUT_OF_MEMORY", "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
])  # fmt: skip
def test_out_of_memory_messages_are_recognized(words: str) -> None:
    assert is_out_of_memory(words)
    assert is_out_of_memory(RuntimeError(words))
    assert not is_out_of_memory("CUDA failure 700: an illegal memory access was encountered")
    assert not is_out_of_memory("CUDA failure 900: operation not permitted when stream is capturing")


@pytest.mark.parametrize(
    ("device", "training", "tf32"), [("cuda", {}, "0"), ("cuda", {"precision": {"tf32": True}}, "1"), ("cpu", {}, None)]
)
def test_session_options_keep_fp32_results(
    device: Device,
    training: dict[str, Any],
    tf32: str | None,
    write_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    path = write_model(tmp_path / "drn.onnx", training=training)
    given: list[Any] = []

    def session(*_: Any, providers: Any, disabled_optimizers: Any, **__: Any) -> Any:
        given.extend((providers, disabled_optimizers))
        raise RuntimeError("It is only looked at.")

    available = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    with raises(ModelFileError, "not_onnx", path, "It is only looked at"):
        open_backend(path, device)
    options = {"use_tf32": tf32, "cudnn_conv_algo_search": "HEURISTIC"}
    if device == "cuda":
        assert given == [[("CUDAExecutionProvider", options)], None]
    else:
        assert given == [["CPUExecutionProvider"], ["Pad_Fusion"]]


def test_full_device_differs_from_invalid_batch_error(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is asked again in halves, which the second must not be."""
    backend: Any = open_backend(tiny_model, "cpu", 1)
    batch = Batch(np.zeros((1, 1), np.int32), np.ones(1, np.int32), *(np.zeros((1, 2, n), np.float32) for n in (3, 2)))
    with raises(ShapeError, "shape_mismatch", "segment_features"):
        backend.run(batch)

    class Full:
        def run(self, outputs: Any, feed: Any) -> Any:
            raise RuntimeError("BFCArena: Failed to allocate memory for requested buffer of size 4294967296\nmore")

    monkeypatch.setattr(backend._session, "_session", Full())
    with raises(DeviceMemoryError, "out_of_memory", 4294967296, "--batch-size"):
        backend.run(batch)


def test_unknown_suffix_and_missing_file_are_rejected(tmp_path: Path) -> None:
    with raises(ModelFileError, "wrong_suffix", tmp_path / "model.h5"):
        open_backend(tmp_path / "model.h5")
    with raises(ModelFileError, "missing_file", tmp_path / "model.onnx"):
        open_backend(tmp_path / "model.onnx")
