"""Test `runtime.core.gpu_info` with outputs of nvidia-smi and a double of the CUDA driver."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from runtime.core import gpu_info
from runtime.core.errors import DeviceError
from runtime.core.gpu_info import FIELDS, OPTIONAL_FIELDS, Gpu, list_gpus, parse_gpu, selected_gpu, throttle_reasons
from tests.raising import raises

LINE = "NVIDIA H100 80GB HBM3, 575.57, 1980, 1980, 31, 113.27, 1024, 81559, 0x0000000000000044, 9.0"
H100 = Gpu(
    "NVIDIA H100 80GB HBM3", "575.57", 1980, 1980, 31, 113.27, 1024, 81559, ("power limit", "heat (hardware)"), "9.0"
)
CURRENT = (*FIELDS, *OPTIONAL_FIELDS[0])


@pytest.fixture
def nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[list[str]], tuple[int, str]]], list[list[str]]]:
    """Replace nvidia-smi by a function of its arguments that returns exit code and output; record the calls."""

    def replace(answer: Callable[[list[str]], tuple[int, str]]) -> list[list[str]]:
        calls: list[list[str]] = []

        def run(words: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
            calls.append(words)
            code, output = answer(words)
            return subprocess.CompletedProcess(words, code, output, "")

        monkeypatch.setattr(gpu_info.shutil, "which", lambda name: name)
        monkeypatch.setattr(gpu_info.subprocess, "run", run)
        return calls

    return replace


def test_parse_gpu_reads_all_fields() -> None:
    assert parse_gpu(LINE, CURRENT) == H100
    assert str(H100) == "NVIDIA H100 80GB HBM3, 575.57, 81559 MiB, 9.0"


def test_parse_gpu_returns_none_for_unavailable_values() -> None:
    gpu = parse_gpu("Tesla, 1.0, [N/A], [Not Supported], 31, [N/A], 1, [N/A], [N/A]", (*FIELDS, *OPTIONAL_FIELDS[2]))
    assert gpu == Gpu("Tesla", "1.0", temperature_c=31, used_mib=1)
    assert str(gpu) == "Tesla, 1.0"
    assert parse_gpu("No devices were found", CURRENT) is None


def test_throttle_reasons_omit_idle_and_requested_clocks() -> None:
    assert throttle_reasons("0x0000000000000001") == ()
    assert throttle_reasons("0x0000000000000028") == ("hardware slowdown", "heat (software)")
    assert throttle_reasons("0x0000000000001000") == ("0x1000",)


def test_list_gpus_returns_every_gpu(nvidia_smi: Any) -> None:
    calls = nvidia_smi(lambda words: (0, f"{LINE}\n{LINE}\n"))
    assert list_gpus() == [H100, H100]
    assert len(calls) == 1
    assert not [word for word in calls[0] if word.startswith("--id")]


@pytest.mark.parametrize(
    ("unknown", "line", "attempts"),
    [(["clocks_event_reasons"], LINE, 2), (["clocks_event_reasons", "compute_cap"], LINE.rpartition(",")[0], 3)],
)
def test_old_drivers_are_queried_with_their_fields(
    nvidia_smi: Any, unknown: list[str], line: str, attempts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = nvidia_smi(
        lambda words: (2, "not a valid field") if any(field in words[2] for field in unknown) else (0, line)
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    gpu = selected_gpu()
    assert gpu is not None
    assert gpu.sm_mhz == 1980
    assert [words[1] for words in calls] == ["--id=2"] * attempts


@pytest.mark.parametrize(("output", "value"), [("NVIDIA-SMI has failed\n", "NVIDIA-SMI has failed"), ("", "no output")])
def test_failing_nvidia_smi_raises_device_error(nvidia_smi: Any, output: str, value: str) -> None:
    nvidia_smi(lambda words: (9, output))
    with raises(DeviceError, "gpu_unavailable", value):
        list_gpus()
    assert selected_gpu() is None


def test_hanging_or_missing_nvidia_smi_raises_device_error(nvidia_smi: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(words: list[str]) -> tuple[int, str]:
        raise subprocess.TimeoutExpired(words, gpu_info.TIMEOUT_S)

    calls = nvidia_smi(hang)
    with raises(DeviceError, "gpu_unavailable", "nvidia-smi", gpu_info.TIMEOUT_S):
        list_gpus()
    assert len(calls) == 1
    monkeypatch.setattr(gpu_info.shutil, "which", lambda name: None)
    with raises(DeviceError, "gpu_unavailable", "nvidia-smi"):
        list_gpus()


class FakeCuda:
    """The functions of libcuda that `gpu_info` calls, with `count` GPUs; status codes as in cuda.h."""

    def __init__(self, count: int) -> None:
        self.count = count

    def cuInit(self, flags: int) -> int:
        # "CUDA_ERROR_NO_DEVICE" = 100.
        return 0 if self.count else 100

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        # "CUDA_ERROR_INVALID_DEVICE" = 101.
        return 0 if ordinal < self.count else 101

    def cuDeviceGetName(self, name: Any, length: int, device: Any) -> int:
        name.value = b"NVIDIA H200"
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        _write(value, {75: 9, 76: 0}[attribute])
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:
        _write(version, 12080)
        return 0


def _write(pointer: Any, value: int) -> None:
    ctypes.cast(pointer, ctypes.POINTER(ctypes.c_int))[0] = value


@pytest.mark.parametrize(("count", "gpu"), [(1, Gpu("NVIDIA H200", capability="9.0")), (0, None)])
def test_cuda_gpu_reads_the_driver(monkeypatch: pytest.MonkeyPatch, count: int, gpu: Gpu | None) -> None:
    monkeypatch.setattr(gpu_info.ctypes, "CDLL", lambda name: FakeCuda(count))
    assert gpu_info.cuda_gpu() == gpu
    assert gpu_info.cuda_version() == "12.8"


def test_cuda_gpu_without_driver_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(gpu_info.ctypes, "CDLL", missing)
    assert (gpu_info.cuda_gpu(), gpu_info.cuda_version()) == (None, None)
