"""`runtime.backends`: a model file is opened by what it is, or refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.artifacts.manifest import METADATA_KEY
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


@pytest.mark.parametrize(("training", "tf32"), [(None, "0"), ({}, "0"), ({"precision": {"tf32": True}}, "1")])
def test_fp32_on_gpu_disables_tf32_unless_graph_allows_it(
    training: dict[str, Any] | None, tf32: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnxruntime, onnx = pytest.importorskip("onnxruntime"), pytest.importorskip("onnx")
    graph, path = onnx.load(tiny_model), tmp_path / "drn.onnx"
    if training is not None:
        about = json.loads(next(entry.value for entry in graph.metadata_props if entry.key == METADATA_KEY))
        onnx.helper.set_model_props(graph, {METADATA_KEY: json.dumps({**about, "training": training})})
    onnx.save(graph, path)
    given: list[Any] = []

    def session(*_: Any, providers: Any, **__: Any) -> Any:
        given.extend(providers)
        raise RuntimeError("no GPU")

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    with pytest.raises(ModelFileError):
        open_backend(path, "cuda")
    ((name, options),) = given
    assert name == "CUDAExecutionProvider"
    assert options == {"use_tf32": tf32, "cudnn_conv_algo_search": "HEURISTIC"}


@pytest.mark.parametrize(("device", "disabled"), [("cpu", ["Pad_Fusion"]), ("cuda", None)])
def test_pad_fusion_is_disabled_on_cpu_only(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, device: Device, disabled: list[str] | None
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    given: list[Any] = []

    def session(*arguments: Any, **options: Any) -> Any:
        given.append(options["disabled_optimizers"])
        raise RuntimeError("It is only looked at.")

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    with raises(ModelFileError, "not_onnx", tiny_model, "It is only looked at"):
        open_backend(tiny_model, device)
    assert given == [disabled]


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
