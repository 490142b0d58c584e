"""Read name, features and number of usable cores of this machine's CPU."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

# CPU features that decide which kernels of ONNX Runtime and torch run, by Linux's names: of x86, then of Arm.
CPU_FEATURES = (
    "sse4_1", "avx", "avx2", "fma", "avx512f", "avx512bw", "avx_vnni", "avx512_vnni", "amx_int8",
    "asimd", "asimddp", "i8mm", "sve",
)  # fmt: skip


def cpu_features() -> tuple[str, ...] | None:
    """Return which of `CPU_FEATURES` this CPU has, as Linux lists them; None where the system does not list them."""
    for line in _lines("/proc/cpuinfo"):
        # "flags" on x86, "Features" on Arm.
        if line.lower().startswith(("flags", "features")):
            listed = set(line.partition(":")[2].split())
            return tuple(name for name in CPU_FEATURES if name in listed)
    return None


def cpu_name() -> str:
    """Return the CPU's name as the system reports it."""
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu() -> dict[str, Any]:
    """Return name, architecture and features of this CPU, for reports; features are None where they are not known."""
    features = cpu_features()
    return {
        "name": cpu_name(),
        "architecture": platform.machine(),
        "features": None if features is None else list(features),
    }


def cores() -> int:
    """Return the CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
