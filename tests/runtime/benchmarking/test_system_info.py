"""Test `runtime.benchmarking.system_info`: state of the machine, versions, and the warning about other load."""

from __future__ import annotations

import pytest

from runtime.benchmarking import system_info
from runtime.benchmarking.system_info import SystemState, background_load_warning, conditions, throttling
from runtime.core import cpu_info
from runtime.core.gpu_info import Gpu


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
    monkeypatch.setattr(cpu_info, "system_lines", lambda path: lines)
    assert cpu_info.cpu_features() == features


def test_system_state_without_gpu_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_info, "selected_gpu", lambda: None)
    state = conditions("before")
    assert isinstance(state, SystemState)
    assert (state.when, state.gpu) == ("before", None)
    assert throttling([state]) == ()


def test_throttling_lists_each_reason_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_info, "selected_gpu", lambda: Gpu("GPU", throttled_by=("power limit", "power brake")))
    assert throttling([conditions("before"), conditions("after")]) == ("power limit", "power brake")


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
