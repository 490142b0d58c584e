"""Read name, features and number of usable cores of the CPU of this machine."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

# CPU features that select the kernels of ONNX Runtime and torch, as Linux names them: x86, then Arm.
CPU_FEATURES = (
    "sse4_1", "avx", "avx2", "fma", "avx512f", "avx512bw", "avx_vnni", "avx512_vnni", "amx_int8",
    "asimd", "asimddp", "i8mm", "sve",
)  # fmt: skip


def cpu_features() -> tuple[str, ...] | None:
    """Return those of `CPU_FEATURES` that this CPU has; None if the system does not list features."""
    for line in system_lines("/proc/cpuinfo"):
        # The line is named "flags" on x86, "Features" on Arm.
        if line.lower().startswith(("flags", "features")):
            listed = set(line.partition(":")[2].split())
            return tuple(name for name in CPU_FEATURES if name in listed)
    return None


def cpu_name() -> str:
    """Return the name of the CPU as the system reports it."""
    for line in system_lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu() -> dict[str, Any]:
    """Return name, architecture and features of this CPU for reports; features are None if unknown."""
    features = cpu_features()
    return {
        "name": cpu_name(),
        "architecture": platform.machine(),
        "features": None if features is None else list(features),
    }


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def system_lines(path: str) -> list[str]:
    """Return the lines of a file of the system, such as /proc/cpuinfo; empty if there is none."""
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
