"""`runtime.benchmarking.system_info`: what is read off nvidia-smi and the system, and when a machine is called busy."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from runtime.benchmarking import system_info
from runtime.benchmarking.system_info import (
    SystemState,
    background_load_warning,
    conditions,
    parse_gpu,
    throttle_reasons,
    throttling,
)
from runtime.core import cpu_info

LINE = "NVIDIA H100 80GB HBM3, 575.57, 1980, 1980, 31, 113.27, 1024, 81559, 0x0000000000000044"


def test_nvidia_smi_line_is_parsed() -> None:
    found = parse_gpu(LINE)
    assert found == system_info.Gpu(
        "NVIDIA H100 80GB HBM3", "575.57", 1980, 1980, 31, 113.27, 1024, 81559, ("power limit", "heat (hardware)")
    )


def test_unavailable_gpu_values_are_none() -> None:
    found = parse_gpu("Tesla, 1.0, [N/A], [Not Supported], 31, [N/A], 1, 2, [N/A]")
    assert found is not None
    assert (found.sm_mhz, found.max_sm_mhz, found.power_w, found.throttled_by) == (None, None, None, ())
    assert parse_gpu("No devices were found") is None


def test_idle_gpu_is_not_throttled() -> None:
    assert throttle_reasons("0x0000000000000001") == ()
    assert throttle_reasons("0x0000000000000028") == ("hardware slowdown", "heat (software)")
    assert throttle_reasons("0x0000000000001000") == ("0x1000",)


def test_old_driver_is_queried_with_old_field_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run(words: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(words)
        new = "clocks_event_reasons" in words[2]
        return subprocess.CompletedProcess(words, 2 if new else 0, "not a valid field" if new else LINE + "\n", "")

    monkeypatch.setattr(system_info.shutil, "which", lambda _: "nvidia-smi")
    monkeypatch.setattr(system_info.subprocess, "run", run)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    found = system_info.gpu()
    assert found is not None
    assert found.sm_mhz == 1980
    assert [words[1] for words in asked] == ["--id=2", "--id=2"]
    assert throttling([conditions("now"), conditions("then")]) == ("power limit", "heat (hardware)")


@pytest.mark.parametrize(
    ("lines", "features"),
    [
        (["flags\t\t: fpu sse4_1 avx2 fma erms", "model name\t: x"], ("sse4_1", "avx2", "fma")),
        (["flags\t\t: avx512_vnni avx2"], ("avx2", "avx512_vnni")),
        (["processor\t: 0", "Features\t: fp asimd asimddp"], ("asimd", "asimddp")),
        (["flags\t\t: fpu"], ()),
        ([], None),
    ],
)
def test_cpu_features_are_read_from_cpuinfo(
    lines: list[str], features: tuple[str, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_info, "_lines", lambda path: lines)
    assert cpu_info.cpu_features() == features


def test_system_state_without_gpu_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_info.shutil, "which", lambda _: None)
    found = conditions("before")
    assert isinstance(found, SystemState)
    assert (found.when, found.gpu) == ("before", None)
    assert throttling([found]) == ()


@pytest.mark.parametrize(
    ("before", "after", "cores", "threads", "busy"),
    [
        (0.1, 1.1, 2, 1, False),
        (1.8, 1.0, 2, 1, True),
        (0.1, 3.2, 2, 1, True),
        (1.8, 2.8, 16, 1, False),
        (0.9, 2.0, 2, 2, True),
        (None, None, 2, 1, False),
    ],
)
def test_busy_machine_gives_background_load_warning(
    before: float | None, after: float | None, cores: int, threads: int, busy: bool
) -> None:
    assert (background_load_warning(before, after, cores, threads) is not None) is busy


def test_system_info_reports_memory_versions_and_cpu() -> None:
    assert system_info.peak_rss_bytes() > 10 * 2**20
    assert {"python", "numpy", "drn-deploy"} <= set(system_info.versions())
    assert cpu_info.cores() >= 1
    assert cpu_info.cpu_name()
