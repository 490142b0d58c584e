"""Create a directory of wheels and chunks for tests of leases."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

from benchmarks.acceptance.packages import current_python

# Unpacks a chunk, a zip file here, as the packer's own program does: `add CHUNK --dest DIR`, and `verify --dest DIR`.
UNPACK = """
import argparse, hashlib, json, os, sys, zipfile
parser = argparse.ArgumentParser()
parser.add_argument("verb")
parser.add_argument("chunks", nargs="*")
parser.add_argument("--dest")
given = parser.parse_args()
manifest = json.load(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "manifest.json")))
for chunk in given.chunks:
    with zipfile.ZipFile(chunk) as archive:
        archive.extractall(given.dest)
if given.verb == "verify":
    bad = 0
    for name, entry in manifest["files"].items():
        path = os.path.join(given.dest, name)
        whole = os.path.exists(path) and hashlib.sha256(open(path, "rb").read()).hexdigest() == entry["sha256"]
        bad += not whole
        if not whole:
            print(name + ": missing or changed")
    print(len(manifest["files"]), "files,", bad, "bad")
    sys.exit(bad > 0)
"""


def write_wheel(folder: Path, name: str, files: Mapping[str, str], requires: tuple[str, ...] = ()) -> Path:
    """Write a wheel with the given files."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-1.0-py3-none-any.whl"
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0", *(f"Requires-Dist: {line}" for line in requires)]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}-1.0.dist-info/METADATA", "\n".join(metadata) + "\n")
        for entry, text in files.items():
            archive.writestr(entry, text)
    return path


def write_chunks(folder: Path, count: int, use: str = "export PYTHONPATH={dest}/site") -> Path:
    """Write a library `made_up_library` in so many chunks."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {f"site/made_up_library/part_{number}.py": f"VALUE = {number}\n" for number in range(count)}
    chunks = {}
    for number, (name, text) in enumerate(texts.items()):
        path = folder / f"chunk_{number:03d}.bin"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, text)
        chunks[path.name] = {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    files = {name: {"sha256": hashlib.sha256(text.encode()).hexdigest()} for name, text in texts.items()}
    (folder / "manifest.json").write_text(json.dumps({"chunks": chunks, "files": files, "links": {}, "use": use}))
    (folder / "unpack_carry.py").write_text(UNPACK)
    return folder


def write_packages(directory: Path, chunks: int = 0) -> Path:
    """Write wheels for this Python, and TensorRT's double in so many chunks."""
    write_wheel(directory / f"wheels-{current_python()}", "made_up_wheel", {"made_up_wheel.py": "VALUE = 1\n"})
    if chunks:
        write_chunks(directory / "tensorrt", chunks)
    return directory
