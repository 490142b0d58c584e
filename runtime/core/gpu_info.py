"""Query the GPUs of this machine through nvidia-smi and the CUDA driver, without TensorRT and torch."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import shutil
import subprocess
from collections.abc import Sequence

from runtime.core.errors import DeviceError, excerpt

TIMEOUT_S = 20
FIELDS = (
    "name", "driver_version", "clocks.sm", "clocks.max.sm", "temperature.gpu", "power.draw", "memory.used",
    "memory.total",
)  # fmt: skip
# Drivers before 535 have only the older name of the reasons, and drivers before 510 have no compute_cap.
OPTIONAL_FIELDS = (
    ("clocks_event_reasons.active", "compute_cap"),
    ("clocks_throttle_reasons.active", "compute_cap"),
    ("clocks_throttle_reasons.active",),
)
# Bits for an idle GPU and a requested clock limit, which are not reported.
IGNORED_THROTTLE_REASONS = 0x1 | 0x2
REASONS = {
    0x4: "power limit",
    0x8: "hardware slowdown",
    0x10: "synchronised with another GPU",
    0x20: "heat (software)",
    0x40: "heat (hardware)",
    0x80: "power brake",
    0x100: "display clocks",
}
# CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h.
_CAPABILITY_ATTRIBUTES = (75, 76)


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU; values that its source does not report are None.

    Attributes:
        capability: compute capability, as "9.0".
    """

    name: str
    driver: str | None = None
    sm_mhz: float | None = None
    max_sm_mhz: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    used_mib: float | None = None
    total_mib: float | None = None
    throttled_by: tuple[str, ...] = ()
    capability: str | None = None

    def __str__(self) -> str:
        memory = None if self.total_mib is None else f"{self.total_mib:.0f} MiB"
        return ", ".join(filter(None, (self.name, self.driver, memory, self.capability)))


def list_gpus(index: str | None = None) -> list[Gpu]:
    """Return the GPUs that nvidia-smi reports, at least one; takes up to a second.

    Args:
        index: index or UUID of a GPU; None for all.

    Raises:
        DeviceError: nvidia-smi is missing, fails or does not answer (code `gpu_unavailable`).
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        raise DeviceError(
            "nvidia-smi is not installed, so there is no NVIDIA driver. Models run on the CPU.", code="gpu_unavailable"
        )
    selection = [] if index is None else [f"--id={index}"]
    reason = ""
    for optional in OPTIONAL_FIELDS:
        fields = (*FIELDS, *optional)
        words = [tool, *selection, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
        try:
            result = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_S)
        except OSError as error:
            reason = str(error)
            break
        except subprocess.TimeoutExpired:
            reason = f"no answer within {TIMEOUT_S} s"
            break
        gpus = [gpu for line in result.stdout.splitlines() if (gpu := parse_gpu(line, fields))]
        if result.returncode == 0 and gpus:
            return gpus
        reason = next(iter((result.stdout + result.stderr).strip().splitlines()), "no output")
    raise DeviceError(
        f"nvidia-smi failed: {excerpt(reason)}. Install or repair the NVIDIA driver.", code="gpu_unavailable"
    )


def selected_gpu() -> Gpu | None:
    """Return what nvidia-smi reports of the first GPU in CUDA_VISIBLE_DEVICES, or of GPU 0; None if it fails."""
    index = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip() or "0"
    with contextlib.suppress(DeviceError):
        return list_gpus(index)[0]
    return None


def parse_gpu(line: str, fields: Sequence[str]) -> Gpu | None:
    """Return the GPU in one line of nvidia-smi's table.

    Args:
        line: line of the output for `--format=csv,noheader,nounits`.

    Returns:
        The GPU; None if the line is not a row of the table.
    """
    cells = [cell.strip() for cell in line.split(",")]
    if len(cells) != len(fields):
        return None
    values = dict(zip(fields, cells))
    sm, max_sm, temperature, power, used, total = (_number(values[field]) for field in FIELDS[2:])
    reasons = next(text for field, text in values.items() if field.endswith("_reasons.active"))
    capability = values.get("compute_cap")
    return Gpu(cells[0], cells[1], sm, max_sm, temperature, power, used, total, throttle_reasons(reasons), capability)


def throttle_reasons(mask: str) -> tuple[str, ...]:
    """Return the names of the reasons for a reduced clock in a bit mask such as "0x0000000000000004".

    An idle GPU and a clock limit that a user requested are omitted. Unknown bits are returned as one hexadecimal
    number.
    """
    try:
        bits = int(mask, 16) & ~IGNORED_THROTTLE_REASONS
    except ValueError:
        return ()
    unknown = bits & ~sum(REASONS)
    return tuple(reason for bit, reason in REASONS.items() if bits & bit) + ((hex(unknown),) if unknown else ())


def cuda_gpu() -> Gpu | None:
    """Return name and compute capability of the first GPU that CUDA offers; None without a driver or a GPU.

    Only the driver is called, because TensorRT ends the process on machines without one.
    """
    cuda, device = _load_cuda(), ctypes.c_int()
    if cuda is None or cuda.cuInit(0) != 0 or cuda.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return None
    name = ctypes.create_string_buffer(256)
    cuda.cuDeviceGetName(name, len(name), device)
    numbers = [ctypes.c_int() for _ in _CAPABILITY_ATTRIBUTES]
    for attribute, number in zip(_CAPABILITY_ATTRIBUTES, numbers):
        cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
    capability = ".".join(str(number.value) for number in numbers)
    return Gpu(name.value.decode(errors="replace"), capability=capability)


def cuda_version() -> str | None:
    """Return the newest CUDA version that the driver supports, as 13.0; None without a driver."""
    cuda, version = _load_cuda(), ctypes.c_int()
    if cuda is None or cuda.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _load_cuda() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
