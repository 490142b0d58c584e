"""Open the models of a benchmark, and measure the time and memory of opening them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from runtime.artifacts.engine_metadata import read_verified
from runtime.artifacts.manifest import Manifest
from runtime.backends.base import Device
from runtime.benchmarking import system_info
from runtime.benchmarking.report import Memory, ModelInfo
from runtime.benchmarking.workload import device_of, ground_first, synthetic_workload
from runtime.core import gpu_info
from runtime.core.errors import DeviceError
from runtime.core.io.digests import sha256
from runtime.core.video import Video
from runtime.grounding.grounder import Grounder


def model_labels(paths: Sequence[Path]) -> list[str]:
    """Return a distinct label for each model: its file name, or its path if names are equal, numbered if paths are."""
    names = [path.name if [other.name for other in paths].count(path.name) == 1 else str(path) for path in paths]
    return [
        name if names.count(name) == 1 else f"{name} ({names[: index + 1].count(name)})"
        for index, name in enumerate(names)
    ]


def model_files(path: Path, manifest: Manifest) -> list[Path]:
    """Return the files of a model, starting with `path`."""
    parts = [path.with_name(Path(name).name) for name in manifest.video_part]
    if path.suffix == ".engine":
        # The manifest records the ONNX file that the part was built from.
        parts = [part.with_suffix(".engine") for part in parts]
        unrolled = read_verified(path).get("unrolled", ()) if path.is_file() else ()
        parts += [path.with_name(Path(name).name) for name in unrolled]
    return [path, *(part for part in parts if part.is_file())]


def open_model(
    path: Path,
    label: str,
    device: Device,
    threads: int | None,
    pairs: Sequence[tuple[Video, str]],
    cold_start_s: float | None,
) -> tuple[Grounder, ModelInfo]:
    """Open a model, ground one query, and return the model with the time and memory that both took.

    Args:
        pairs: the first is grounded; a synthetic one if empty.
        cold_start_s: seconds that `cold_start` measured; None if it failed.
    """
    rss, gpu = system_info.rss_bytes(), gpu_info.selected_gpu()
    start = time.perf_counter()
    grounder = Grounder.load(path, device, threads)
    # Without windows, each query is one run of the network.
    grounder.windows = None
    open_s = time.perf_counter() - start
    pairs = pairs or synthetic_workload([grounder.manifest]).pairs
    ground_start = time.perf_counter()
    ground_first(grounder, pairs)
    first_answer_s = open_s + time.perf_counter() - ground_start
    manifest, used_device = grounder.manifest, device_of(grounder)
    files = model_files(path, manifest)
    report = getattr(grounder.backend, "memory_report", lambda: None)()
    rss_now = system_info.rss_bytes()
    memory = Memory(
        files=sum(file.stat().st_size for file in files),
        rss_growth=rss_now - rss if rss_now is not None and rss is not None else None,
        plan=getattr(report, "plan", None),
        device=getattr(report, "device", None),
        pinned=getattr(report, "pinned", None),
        gpu_growth=_gpu_growth(gpu) if used_device == "cuda" else None,
    )
    hashes = {file.name: sha256(file) for file in files}
    info = ModelInfo(
        label=label,
        sha256=hashes[path.name],
        files=hashes,
        precision=manifest.precision,
        kind="pair" if grounder.is_pair else "whole",
        device=used_device,
        open_s=open_s,
        first_answer_s=first_answer_s,
        cold_start_s=cold_start_s,
        memory=memory,
    )
    return grounder, info


def _gpu_growth(before: gpu_info.Gpu | None) -> int | None:
    """Return by how many bytes the GPU's used memory has grown; None where it is unknown."""
    if before is None or before.used_mib is None:
        return None
    after = gpu_info.selected_gpu()
    if after is None or after.used_mib is None:
        return None
    return int((after.used_mib - before.used_mib) * 2**20)


def cold_start(path: Path, device: Device, threads: int | None) -> float:
    """Return the seconds from the start of a new process until it has grounded a query with a model file.

    Args:
        device: `auto`, `cpu` or `cuda`.
        threads: number of CPU threads. Default: set by the runtime.

    Raises:
        DeviceError: the process failed.
    """
    code = (
        "import sys; from runtime.benchmarking.workload import ground_first; "
        "from runtime.grounding.grounder import Grounder; "
        f"ground_first(Grounder.load({str(path.resolve())!r}, {device!r}, {threads!r})); print('answered', flush=True)"
    )
    root = Path(__file__).resolve().parents[2]
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=root
    ) as process:
        assert process.stdout is not None
        try:
            answered = any(line.startswith("answered") for line in process.stdout)
            seconds = time.perf_counter() - start
        except BaseException:
            process.kill()
            raise
    if not answered:
        raise DeviceError(
            f"The cold start of {path.name} was not measured, because a new process could not ground a query. Try "
            "`python -m runtime.infer` with this model.",
            code="measurement_failed",
        )
    return seconds
