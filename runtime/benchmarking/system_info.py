"""Read what machine this is, and its current load, clocks and temperature."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import resource
import sys
from collections.abc import Sequence

from runtime.core.cpu_info import system_lines
from runtime.core.gpu_info import Gpu, selected_gpu

# Libraries that a backend imports: listed where they are in use.
LIBRARIES = ("onnxruntime", "tensorrt", "tensorrt_rtx", "tensorrt_lean", "torch")


@dataclasses.dataclass(frozen=True)
class SystemState:
    """The state of the machine at one moment.

    Attributes:
        when: for people: before, after, or what was measured last.
        load: processes that ran or waited, on average over the last minute; None where the system does not say.
        cpu_mhz: mean clock of the CPU's cores.
        governor: how Linux chooses that clock.
        gpu: the first GPU that CUDA would take.
    """

    when: str
    load: float | None
    cpu_mhz: float | None
    governor: str | None
    gpu: Gpu | None


def versions() -> dict[str, str]:
    """Return the versions of Python, NumPy, this package and the libraries that run a network in this process."""
    result = {"python": platform.python_version()}
    for name in ("drn-deploy", "numpy"):
        try:
            result[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            result[name] = "unknown"
    result.update((name, str(sys.modules[name].__version__)) for name in LIBRARIES if name in sys.modules)
    return result


def conditions(when: str) -> SystemState:
    """Look at the machine now; takes up to a second where there is a GPU."""
    try:
        load: float | None = os.getloadavg()[0]
    except OSError:
        load = None
    clocks = [float(line.partition(":")[2]) for line in system_lines("/proc/cpuinfo") if line.startswith("cpu MHz")]
    governor = "".join(system_lines("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")).strip()
    return SystemState(when, load, sum(clocks) / len(clocks) if clocks else None, governor or None, selected_gpu())


def background_load_warning(before: float | None, after: float | None, num_cores: int, threads: int) -> str | None:
    """Return a sentence if others left too little of the machine, else None.

    Args:
        before: load before anything was measured, which is of others.
        after: load at the end, this process included.
        num_cores: that this process may use.
        threads: that it used.
    """
    others = max(before or 0.0, (after or 0.0) - threads)
    if others + threads <= num_cores + 0.25:
        return None
    return (
        f"The machine was busy: others kept {others:.1f} of its {num_cores} cores at work, and this took {threads} "
        "more. Times are longer than on a quiet machine; ratios of one run are steadier than times."
    )


def throttling(states: Sequence[SystemState]) -> tuple[str, ...]:
    """Return what slowed the GPU's clock at any of these moments."""
    reasons = [reason for state in states if state.gpu for reason in state.gpu.throttled_by]
    return tuple(dict.fromkeys(reasons))


def peak_rss_bytes() -> int:
    """Return the most memory that this process ever had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # In bytes on macOS, in kilobytes elsewhere.
    return peak if sys.platform == "darwin" else peak * 1024


def rss_bytes() -> int | None:
    """Return the memory that this process has now; None where the system does not say."""
    for line in system_lines("/proc/self/statm"):
        return int(line.split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return None
