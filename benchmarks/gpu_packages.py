"""Collect the packages that a GPU machine without a registry lacks, as wheels and chunks."""

from __future__ import annotations

import argparse
import logging
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import Requirement

from benchmarks.acceptance.lease import TENSORRT
from benchmarks.acceptance.packages import calls, normalized, total_bytes
from benchmarks.acceptance.run_config import ROOT
from runtime.core.errors import GroundingError

log = logging.getLogger("drn")

# Packages of the machine's own Python.
PRESENT = (
    "torch", "onnx", "onnxruntime", "numpy", "matplotlib", "tqdm",
    "ml-dtypes", "packaging", "typing-extensions", "sympy", "protobuf",
)  # fmt: skip
# Other requirements of this repository; torch's exporter requires onnxscript, and reports of builds jinja2.
ROOTS = ("nltk", "tyro", "onnxscript", "jinja2")
# The Python that comes with TensorRT's chunks has NumPy only, and no torch supports it.
ROOTS_BESIDE_TENSORRT = ("nltk", "tyro", "tqdm", "onnx", "onnxruntime", "jinja2")
PRESENT_BESIDE_TENSORRT = ("numpy",)
# Newest first; pip matches each tag exactly.
TAGS = ("2_39", "2_35", "2_34", "2_31", "2_28", "2_27", "2_24", "2_17", "2014", "2010", "1")
# The version of Python that a TensorRT is packed with, if it is not the machine's own.
PYTHON_OF_SET = {"tensorrt-86": "3.9"}

Fetch = Callable[[str], Path]


def collect(roots: Sequence[str], present: Sequence[str], python: str, fetch: Fetch) -> list[Path]:
    """Return the wheels of `roots` and their requirements, without those that are present.

    Args:
        roots: names of distributions.
        present: names of installed distributions; their requirements are not collected.
        python: version of Python, for which environment markers are evaluated; pip uses those of its own Python.
        fetch: function from a requirement such as "regex>=2021.8.3" to a wheel.
    """
    environment = {
        "python_version": python, "python_full_version": f"{python}.0", "platform_system": "Linux",
        "sys_platform": "linux", "platform_machine": "x86_64", "implementation_name": "cpython",
        "platform_python_implementation": "CPython", "os_name": "posix", "extra": "",
    }  # fmt: skip
    done = {normalized(name) for name in present}
    queue, wheels = list(roots), []
    while queue:
        requirement = Requirement(queue.pop(0))
        if normalized(requirement.name) in done:
            continue
        done.add(normalized(requirement.name))
        wheels.append(fetch(f"{requirement.name}{requirement.specifier}"))
        with zipfile.ZipFile(wheels[-1]) as archive:
            name = next(entry for entry in archive.namelist() if entry.endswith(".dist-info/METADATA"))
            metadata = HeaderParser().parsestr(archive.read(name).decode(errors="replace"))
        for line in metadata.get_all("Requires-Dist") or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate(environment):
                queue.append(f"{needed.name}{needed.specifier}")
    return wheels


def pinned(requirement: str) -> str:
    """Return a requirement as constraints.txt pins it, if it does."""
    name = normalized(Requirement(requirement).name)
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        match = re.match(r"([A-Za-z0-9_.-]+)==(\S+)", line)
        if match and normalized(match[1]) == name:
            return match[0]
    return requirement


def downloader(folder: Path, python: str, *, pin: bool) -> Fetch:
    """Return a function that downloads the wheel of a requirement into `folder` with pip."""

    def fetch(requirement: str) -> Path:
        before = set(folder.glob("*.whl"))
        chosen = pinned(requirement) if pin else requirement
        words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        words += ["--disable-pip-version-check", "--implementation", "cp", "--python-version", python]
        for tag in TAGS:
            words += ["--platform", f"manylinux{'' if tag in ('1', '2010', '2014') else '_'}{tag}_x86_64"]
        result = subprocess.run([*words, "--dest", str(folder), chosen], capture_output=True, text=True)
        new = set(folder.glob("*.whl")) - before
        if result.returncode or len(new) != 1:
            errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")] or ["no reason given"]
            raise GroundingError(
                f"{chosen} could not be downloaded for Python {python}: {errors[-1][:200]}. "
                "Check the name and the registry.",
                code="download_failed",
            )
        return new.pop()

    return fetch


def write_wheels(output: Path, python: str, roots: Sequence[str], present: Sequence[str], *, pin: bool) -> Path:
    """Write the directory `output`/wheels-VERSION atomically, and return it."""
    output.mkdir(parents=True, exist_ok=True)
    final = output / f"wheels-{python}"
    with tempfile.TemporaryDirectory(dir=output, prefix=".wheels-") as scratch:
        folder = Path(scratch) / "wheels"
        folder.mkdir()
        wheels = collect(roots, present, python, downloader(folder, python, pin=pin))
        shutil.rmtree(final, ignore_errors=True)
        folder.rename(final)
    size = sum((final / path.name).stat().st_size for path in wheels)
    log.info("%s: %d wheels, %.1f MB.", final, len(wheels), size / 1e6)
    return final


def pack(packer: Path, chosen: str, output: Path, chunk_mib: float) -> None:
    """Run the packer, which writes the chunks of a library, unless they exist."""
    if (output / "manifest.json").is_file():
        log.info("%s exists.", output)
        return
    words = [sys.executable, str(packer), chosen, "--out", str(output), "--chunk-mib", str(chunk_mib)]
    if subprocess.run(words).returncode:
        raise GroundingError(
            f"{packer.name} {chosen} failed; see its output. Correct the cause, or remove --pack for plan B.",
            code="packing_failed",
        )


def main(words: Sequence[str] | None = None) -> int:
    """Collect packages, and print which to copy with each call; exit code 2 if one is not available."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_packages", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="directory to fill; see benchmarks/gpu_lease.sh")
    parser.add_argument("--python", default="3.12", help="version of the machine's Python")
    parser.add_argument("--pack", type=Path, help="pack_offline.py, which cuts a library into chunks")
    parser.add_argument("--tensorrt", default="tensorrt-86", help="the set that it packs; tensorrt-86 needs Python 3.9")
    parser.add_argument("--ort", action="store_true", help="also pack onnxruntime-gpu, for plan B")
    parser.add_argument("--chunk-mib", type=float, default=56.0, help="largest chunk")
    given = parser.parse_args(words)
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    try:
        if given.pack is not None and not given.pack.is_file():
            raise GroundingError(f"{given.pack} does not exist. Pass the path of pack_offline.py with --pack.")
        write_wheels(given.output, given.python, ROOTS, PRESENT, pin=True)
        if given.pack is not None:
            beside = PYTHON_OF_SET.get(given.tensorrt, given.python)
            if beside != given.python:
                # The versions in constraints.txt do not support an older Python.
                write_wheels(given.output, beside, ROOTS_BESIDE_TENSORRT, PRESENT_BESIDE_TENSORRT, pin=False)
            pack(given.pack, given.tensorrt, given.output / TENSORRT, given.chunk_mib)
            if given.ort:
                pack(given.pack, "ort-gpu", given.output / "onnxruntime-gpu", given.chunk_mib)
        for number, paths in enumerate(calls(given.output, given.python, int(given.chunk_mib * 2**20)), 1):
            names = " ".join(str(path) for path in paths)
            print(f"call {number}: {names} ({total_bytes(paths) / 2**20:.1f} MiB)")
    except GroundingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Next:  benchmarks/gpu_lease.sh --packages {given.output} --output runs/lease", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
