"""`runtime.backends`: a model file is opened by what it is, or refused in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.backends import Device, open_backend
from runtime.errors import DeviceError, ModelFileError


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


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"ends in \.onnx, \.engine or \.pt"):
        open_backend(tmp_path / "model.h5")
    with pytest.raises(ModelFileError, match="does not exist"):
        open_backend(tmp_path / "model.onnx")
