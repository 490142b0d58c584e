"""Read what machine this is, and its current load, clocks and temperature."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence

from runtime.core.cpu_info import _lines

# Libraries that a backend imports: listed where they are in use.
LIBRARIES = ("onnxruntime", "tensorrt", "tensorrt_rtx", "tensorrt_lean", "torch")
# Reasons for a lower clock that are no trouble: idle, and a limit that was asked for.
IGNORED_THROTTLE_REASONS = 0x1 | 0x2
REASONS = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "power limit",
    0x8: "hardware slowdown",
    0x10: "synchronised with another GPU",
    0x20: "heat (software)",
    0x40: "heat (hardware)",
    0x80: "power brake",
    0x100: "display clocks",
}
GPU_FIELDS = (
    "name",
    "driver_version",
    "clocks.sm",
    "clocks.max.sm",
    "temperature.gpu",
    "power.draw",
    "memory.used",
    "memory.total",
)
# The newer name first; drivers before 535 know the older one alone.
THROTTLE_FIELDS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU as nvidia-smi reports it; None where it does not."""

    name: str
    driver: str
    sm_mhz: float | None
    max_sm_mhz: float | None
    temperature_c: float | None
    power_w: float | None
    used_mib: float | None
    total_mib: float | None
    throttled_by: tuple[str, ...] = ()


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
    clocks = [float(line.partition(":")[2]) for line in _lines("/proc/cpuinfo") if line.startswith("cpu MHz")]
    governor = "".join(_lines("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")).strip()
    return SystemState(when, load, sum(clocks) / len(clocks) if clocks else None, governor or None, gpu())


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


def gpu() -> Gpu | None:
    """Return what nvidia-smi reports of the GPU that CUDA would take first; None without one."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip() or "0"
    for field in THROTTLE_FIELDS:
        fields = ",".join((*GPU_FIELDS, field))
        words = [tool, f"--id={chosen}", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
        try:
            result = subprocess.run(words, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if result.returncode == 0 and result.stdout.strip():
            return parse_gpu(result.stdout.strip().splitlines()[0])
    return None


def parse_gpu(line: str) -> Gpu | None:
    """Read a line of nvidia-smi's table of `GPU_FIELDS` and a throttle field; None if it is another."""
    cells = [cell.strip() for cell in line.split(",")]
    if len(cells) != len(GPU_FIELDS) + 1:
        return None
    sm, max_sm, heat, power, used, total = (_number(cell) for cell in cells[2:8])
    return Gpu(cells[0], cells[1], sm, max_sm, heat, power, used, total, throttle_reasons(cells[8]))


def throttle_reasons(mask: str) -> tuple[str, ...]:
    """Return in words what a mask such as 0x0000000000000004 says, without what is no trouble."""
    try:
        bits = int(mask, 16) & ~IGNORED_THROTTLE_REASONS
    except ValueError:
        return ()
    unknown = bits & ~sum(REASONS)
    return tuple(reason for bit, reason in REASONS.items() if bits & bit) + ((hex(unknown),) if unknown else ())


def peak_rss_bytes() -> int:
    """Return the most memory that this process ever had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # In bytes on macOS, in kilobytes elsewhere.
    return peak if sys.platform == "darwin" else peak * 1024


def rss_bytes() -> int | None:
    """Return the memory that this process has now; None where the system does not say."""
    for line in _lines("/proc/self/statm"):
        return int(line.split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
