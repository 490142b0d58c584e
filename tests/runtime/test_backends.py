"""`runtime.backends`: a model file is opened by what it is, or refused in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.backends import Device, open_backend
from runtime.errors import DeviceError, DeviceMemoryError, ModelFileError, ShapeError
from runtime.tensors import Batch


@pytest.mark.parametrize("threads", [0, -3, 1_000_000])
def test_a_senseless_number_of_threads_is_refused(tiny_model: Path, threads: int) -> None:
    with pytest.raises(DeviceError, match="--threads must be 1 to 1024"):
        open_backend(tiny_model, "cpu", threads)


def test_a_gpu_asked_for_and_absent_is_an_error(tiny_model: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    with pytest.raises(DeviceError, match="cuda device was asked for"):
        open_backend(tiny_model, "cuda")


@pytest.mark.parametrize("device", ["auto", "cuda", "cpu"])
def test_cuda_of_nvidias_wheels_is_loaded_before_a_gpu_is_looked_for(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], device: Device
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    offered = ["CPUExecutionProvider"]

    def preload() -> None:
        print("Failed to load libcudnn.so.9: no such file.")
        offered.append("CUDAExecutionProvider")

    monkeypatch.setattr(onnxruntime, "preload_dlls", preload, raising=False)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: offered)
    if device == "cpu":
        open_backend(tiny_model, device)
        assert offered == ["CPUExecutionProvider"]
    else:
        # Offered, but it does not start: what was not found is in the error.
        with pytest.raises(DeviceError, match=r"could not start its CUDAExecutionProvider.*libcudnn\.so\.9"):
            open_backend(tiny_model, device)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("device", "kept"), [("cpu", ["Pad_Fusion"]), ("cuda", None)])
def test_padding_stays_a_step_of_its_own_on_a_cpu_alone(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, device: Device, kept: list[str] | None
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
    with pytest.raises(ModelFileError, match="only looked at"):
        open_backend(tiny_model, device)
    assert given == [kept]


def test_a_full_device_is_told_from_a_batch_that_does_not_fit(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is asked again in halves, which the second must not be."""
    backend: Any = open_backend(tiny_model, "cpu", 1)
    batch = Batch(np.zeros((1, 1), np.int32), np.ones(1, np.int32), *(np.zeros((1, 2, n), np.float32) for n in (3, 2)))
    with pytest.raises(ShapeError, match="does not take this batch"):
        backend.run(batch)

    class Full:
        def run(self, outputs: Any, feed: Any) -> Any:
            raise RuntimeError("BFCArena: Failed to allocate memory for requested buffer of size 4294967296\nmore")

    monkeypatch.setattr(backend._session, "_session", Full())
    with pytest.raises(DeviceMemoryError, match=r"no memory left.*size 4294967296\); pass a smaller --batch-size"):
        backend.run(batch)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"ends in \.onnx, \.engine or \.pt"):
        open_backend(tmp_path / "model.h5")
    with pytest.raises(ModelFileError, match="does not exist"):
        open_backend(tmp_path / "model.onnx")
