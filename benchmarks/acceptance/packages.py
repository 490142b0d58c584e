"""Read the packages that are copied to a GPU machine: wheels for its Python, and libraries in chunks.

DIR/wheels-3.12/*.whl              packages that its Python lacks (`python -m benchmarks.gpu_packages`)
DIR/tensorrt/chunk_NNN.bin         a library in chunks that fit into one call each
DIR/tensorrt/manifest.json         the SHA-256 of every chunk, and the environment of the library
DIR/tensorrt/unpack_carry.py       the script that unpacks them
DIR/onnxruntime-gpu/...            another library
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.acceptance.lease import ORT_GPU, TENSORRT, Chunks
from runtime.core.errors import GroundingError, one_line, reading
from runtime.core.io.digests import sha256
from runtime.core.io.input_files import read_json

LIBRARIES = (TENSORRT, ORT_GPU)
MANIFEST, UNPACK = "manifest.json", "unpack_carry.py"


@dataclasses.dataclass(frozen=True)
class ChunkedLibrary:
    """A library in chunks, as its manifest describes it.

    Attributes:
        name: name of the library and its directory.
        directory: directory of the chunks.
        sha256: chunk to SHA-256.
        use: shell line with the environment of the library; {dest} is the directory that it is unpacked to.
    """

    name: str
    directory: Path
    sha256: Mapping[str, str]
    use: str

    @property
    def arrived(self) -> list[str]:
        """The chunks that have arrived."""
        return [name for name in self.sha256 if (self.directory / name).is_file()]

    @property
    def python(self) -> str:
        """Version of the Python that comes with the library, such as 3.9; "" for the machine's own."""
        match = re.search(r"/bin/python(\d+\.\d+)", self.use)
        return match[1] if match else ""

    def chunks(self, unpacked: Collection[str], verified: bool, failed: str) -> Chunks:
        """Return the state of the library."""
        left = [name for name in self.sha256 if name not in unpacked]
        waiting = [name for name in left if (self.directory / name).is_file()]
        return Chunks(tuple(waiting), tuple(name for name in left if name not in waiting), verified, failed)


def current_python() -> str:
    """Return the version of this Python, such as 3.12."""
    return f"{sys.version_info[0]}.{sys.version_info[1]}"


def wheels(directory: Path, python: str) -> list[Path]:
    """Return the wheels for a version of Python, after checking them.

    Raises:
        GroundingError: there are none (code no_wheels), or one is damaged (code damaged_wheel).
    """
    folder = directory / f"wheels-{python}"
    paths = sorted(folder.glob("*.whl"))
    if not paths:
        raise GroundingError(
            f"{folder} contains no wheels. Create them with "
            f"`python -m benchmarks.gpu_packages --output {directory} --python {python}`.",
            code="no_wheels",
        )
    for path in paths:
        with reading(path, "a wheel", DamagedWheel, "copy it again"), zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
        if bad:
            raise DamagedWheel(f"{path} is damaged at {bad}. Copy it again.")
    return paths


class DamagedWheel(GroundingError):
    """A wheel is a damaged zip file."""

    code = "damaged_wheel"


class ManifestError(GroundingError):
    """The manifest of a library in chunks cannot be used."""

    code = "invalid_manifest"


def libraries(directory: Path) -> list[ChunkedLibrary]:
    """Return the libraries of which a directory has some or all chunks.

    Raises:
        GroundingError: a manifest cannot be read, or a chunk does not match it (code damaged_chunk).
    """
    known = [_library(directory / name) for name in LIBRARIES if (directory / name).is_dir()]
    for library in known:
        for name in library.arrived:
            if sha256(library.directory / name) != library.sha256[name]:
                raise GroundingError(
                    f"{library.directory / name} is damaged: its SHA-256 is not that in {MANIFEST}. "
                    "Copy it again, or pack the library again.",
                    code="damaged_chunk",
                )
    return known


def _library(directory: Path) -> ChunkedLibrary:
    path = directory / MANIFEST
    content: Any = read_json(path, "list of chunks", ManifestError)
    try:
        hashes = {str(name): str(entry["sha256"]) for name, entry in content["chunks"].items()}
        use = str(content["use"])
    except (TypeError, KeyError, AttributeError) as problem:
        raise ManifestError(
            f"{path} is not a list of chunks ({one_line(problem)}). Copy the file that the packer wrote."
        ) from problem
    odd = [name for name in hashes if not re.fullmatch(r"[A-Za-z0-9_.-]+", name) or name.startswith(".")]
    if odd or not hashes:
        raise ManifestError(f"{path} names {'a chunk ' + repr(odd[0]) if odd else 'no chunk'}. Pack the library again.")
    if not (directory / UNPACK).is_file():
        raise ManifestError(f"{directory / UNPACK} does not exist. Copy it with {MANIFEST}.")
    return ChunkedLibrary(directory.name, directory, hashes, use)


def check_whole(directory: Path, python: str) -> list[ChunkedLibrary]:
    """Return the libraries of a directory, after checking that wheels and chunks are complete.

    Raises:
        GroundingError: wheels or chunks are missing or damaged.
    """
    if not directory.is_dir():
        raise GroundingError(f"{directory} is not a directory. Pass that of the wheels and chunks.")
    wheels(directory, python)
    complete = libraries(directory)
    for library in complete:
        check_present(library, ())
        if library.python:
            wheels(directory, library.python)
    return complete


def check_present(library: ChunkedLibrary, unpacked: Collection[str]) -> None:
    """Raise GroundingError (code missing_chunk) if a chunk has neither arrived nor been unpacked."""
    missing = library.chunks(unpacked, False, "").missing
    if missing:
        raise GroundingError(
            f"{len(missing)} of {len(library.sha256)} chunks of {library.name} are missing in {library.directory}: "
            f"{', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}. Copy them, or pass --more if later "
            "calls bring them.",
            code="missing_chunk",
        )


def calls(directory: Path, python: str, max_bytes: int) -> list[list[Path]]:
    """Return the files to copy with each call, so that the first is small and none is larger than `max_bytes`.

    The first call brings the wheels and the smallest chunk of TensorRT, every other call one chunk. Libraries that plan
    B needs are not included.
    """
    complete = {library.name: library for library in check_whole(directory, python)}
    first = [directory / f"wheels-{python}"]
    library = complete.get(TENSORRT)
    if library is None:
        return [first]
    always = [library.directory / MANIFEST, library.directory / UNPACK]
    beside = [directory / f"wheels-{library.python}"] if library.python else []
    chunks = sorted((library.directory / name for name in library.sha256), key=lambda path: path.stat().st_size)
    groups = [[*first, *always, chunks[0]], *([*always, path] for path in chunks[1:])]
    for path in beside:
        size = total_bytes([path])
        room = next((group for group in groups if total_bytes(group) + size <= max_bytes), None)
        if room is None:
            groups.insert(1, [*always, path])
        else:
            room.append(path)
    return groups


def total_bytes(paths: Sequence[Path]) -> int:
    """Return the size of files and of all files in directories."""
    files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*"))]
    return sum(file.stat().st_size for file in files if file.is_file())


def install(paths: Sequence[Path], site: Path, present: Collection[str]) -> list[str]:
    """Unpack wheels atomically to `site`, and return the names of their distributions.

    Args:
        paths: the wheels.
        site: a directory for PYTHONPATH.
        present: normalized names of installed distributions, which are skipped.
    """
    partial = site.with_name(f".{site.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    installed = []
    for path in paths:
        name = normalized(path.name.split("-")[0])
        if name in present:
            continue
        with zipfile.ZipFile(path) as archive:
            # Without scripts and headers, which PYTHONPATH does not use.
            archive.extractall(partial, [entry for entry in archive.namelist() if ".data/" not in entry])
        installed.append(name)
    shutil.rmtree(site, ignore_errors=True)
    partial.rename(site)
    return installed


def normalized(name: str) -> str:
    """Return the normalized name of a distribution."""
    return re.sub(r"[-_.]+", "-", name).lower()


def unpack(library: ChunkedLibrary, verb: str, destination: Path, chunk: str = "", limit_s: float = 60.0) -> str:
    """Unpack a chunk (verb add) or check all files (verb verify); return the reason of a failure, or ""."""
    line = [sys.executable, str(library.directory / UNPACK), verb]
    line += [str(library.directory / chunk)] if chunk else []
    line += ["--dest", str(destination)]
    try:
        result = subprocess.run(line, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return f"{library.name}: `{verb} {chunk}`".rstrip() + f" took over {limit_s:.0f} s"
    if result.returncode:
        lines = (result.stderr.strip() or result.stdout.strip() or "no message").splitlines()
        errors = [entry for entry in lines if not entry.startswith(("export ", "chunks "))]
        return f"{library.name} could not be unpacked ({verb} {chunk}): {(errors or lines)[-1][:200]}"
    return ""


def environment(library: ChunkedLibrary, destination: Path) -> tuple[dict[str, str], str]:
    """Return the environment variables of a library, and the path of its Python ("" for the machine's own)."""
    words, _, comment = library.use.replace("{dest}", str(destination)).partition("#")
    variables = dict(word.split("=", 1) for word in shlex.split(words) if "=" in word)
    python = next((word for word in comment.split() if os.path.basename(word).startswith("python")), "")
    return variables, python
