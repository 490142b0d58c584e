"""Report the hardware and software of this machine, and its present load, clocks and temperature."""

from __future__ import annotations

import dataclasses
import os
import platform
import resource
import sys
from collections.abc import Sequence

from runtime.core.cpu_info import system_lines
from runtime.core.gpu_info import Gpu, selected_gpu
from runtime.core.packages import installed_version

# Libraries that a backend imports: listed where they are in use.
LIBRARIES = ("onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "tensorrt_lean", "torch")


@dataclasses.dataclass(frozen=True)
class SystemState:
    """The state of the machine at one time; values that the system does not report are None.

    Attributes:
        when: time of the state in words: before, after, or the case that was measured last.
        load: mean number of processes that ran or waited in the last minute.
        governor: Linux frequency governor, which sets that clock.
        gpu: the first GPU that CUDA would use.
    """

    when: str
    load: float | None
    cpu_mhz: float | None
    governor: str | None
    gpu: Gpu | None


def versions() -> dict[str, str]:
    """Return the versions of Python, NumPy, this package and the libraries that run a network in this process."""
    result = {"python": platform.python_version()}
    result.update((name, installed_version(name) or "unknown") for name in ("drn-deploy", "numpy"))
    result.update((name, str(sys.modules[name].__version__)) for name in LIBRARIES if name in sys.modules)
    return result


def conditions(when: str) -> SystemState:
    """Return the present state of the machine; takes up to a second with a GPU."""
    try:
        load: float | None = os.getloadavg()[0]
    except OSError:
        load = None
    clocks = [float(line.partition(":")[2]) for line in system_lines("/proc/cpuinfo") if line.startswith("cpu MHz")]
    governor = "".join(system_lines("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")).strip()
    return SystemState(when, load, sum(clocks) / len(clocks) if clocks else None, governor or None, selected_gpu())


def background_load_warning(before: float | None, after: float | None, num_cores: int, threads: int) -> str | None:
    """Return a warning if other processes used cores that the benchmark needed; else None.

    Args:
        before: load before the measurements, which is that of other processes.
        after: load at the end, this process included.
    """
    others = max(before or 0.0, (after or 0.0) - threads)
    if others + threads <= num_cores + 0.25:
        return None
    return (
        f"Other processes used {others:.1f} of the {num_cores} cores, and this one {threads}. Times are longer than on "
        "an idle machine; ratios from one run vary less than times."
    )


def throttling(states: Sequence[SystemState]) -> tuple[str, ...]:
    """Return the distinct reasons for a reduced clock of the GPU in these states."""
    reasons = [reason for state in states if state.gpu for reason in state.gpu.throttled_by]
    return tuple(dict.fromkeys(reasons))


def peak_rss_bytes() -> int:
    """Return the peak resident memory of this process, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # In bytes on macOS, in kilobytes elsewhere.
    return peak if sys.platform == "darwin" else peak * 1024


def rss_bytes() -> int | None:
    """Return the present resident memory of this process, in bytes; None if the system does not report it."""
    for line in system_lines("/proc/self/statm"):
        return int(line.split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return None
