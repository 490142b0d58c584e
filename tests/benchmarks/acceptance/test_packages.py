"""Test `benchmarks.acceptance.packages`: missing or damaged wheels and chunks are rejected."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from benchmarks import gpu_packages
from benchmarks.acceptance.lease import TENSORRT
from benchmarks.acceptance.packages import (
    ChunkedLibrary,
    calls,
    check_whole,
    current_python,
    environment,
    install,
    libraries,
    normalized,
    total_bytes,
    unpack,
    wheels,
)
from benchmarks.acceptance.run_config import ROOT
from runtime.core.errors import GroundingError
from tests.benchmarks.fake_packages import write_chunks, write_packages, write_wheel
from tests.damage import damaged, random_bits
from tests.file_modules import load_module
from tests.raising import raises

PYTHON = current_python()


WHEEL = f"wheels-{PYTHON}/made_up_wheel-1.0-py3-none-any.whl"
CHUNK, MANIFEST = f"{TENSORRT}/chunk_001.bin", f"{TENSORRT}/manifest.json"


def absent(content: bytes) -> None: ...


def cut(content: bytes) -> bytes:
    return content[:-30]


def manifest(text: str) -> Callable[[bytes], bytes]:
    return lambda _: text.encode()


@pytest.mark.parametrize(
    ("name", "changed", "code"),
    [
        (WHEEL, absent, "no_wheels"),
        (WHEEL, cut, "damaged_file"),
        (WHEEL, lambda content: content.replace(b"VALUE = 1", b"VALUE = 2"), "damaged_wheel"),
        (CHUNK, absent, "missing_chunk"),
        (CHUNK, cut, "damaged_chunk"),
        (CHUNK, lambda _: b"", "damaged_chunk"),
        (f"{TENSORRT}/unpack_carry.py", absent, "invalid_manifest"),
        (MANIFEST, absent, "missing_file"),
        (MANIFEST, cut, "invalid_json"),
        (MANIFEST, manifest("[1, 2]"), "invalid_manifest"),
        (MANIFEST, manifest('{"chunks": {"chunk_000.bin": 1}, "use": ""}'), "invalid_manifest"),
        (MANIFEST, manifest('{"chunks": {}, "use": ""}'), "invalid_manifest"),
        (MANIFEST, manifest('{"chunks": {"../other.bin": {"sha256": "0"}}, "use": ""}'), "invalid_manifest"),
    ],
)
def test_check_library_raises_one_line_error_per_fault(
    name: str, changed: Callable[[bytes], bytes | None], code: str, tmp_path: Path
) -> None:
    packages = write_packages(tmp_path / "packages", chunks=3)
    assert [library.name for library in check_whole(packages, PYTHON)] == [TENSORRT]
    content = changed((packages / name).read_bytes())
    if content is None:
        (packages / name).unlink()
    else:
        (packages / name).write_bytes(content)
    with raises(GroundingError, code):
        check_whole(packages, PYTHON)


def test_every_changed_byte_of_a_chunk_is_detected(tmp_path: Path) -> None:
    packages = write_packages(tmp_path / "packages", chunks=1)
    path = packages / TENSORRT / "chunk_000.bin"
    for _ in damaged(path, random_bits(path.read_bytes(), 40)):
        with raises(GroundingError, "damaged_chunk", path):
            libraries(packages)


def test_chunks_are_split_into_waiting_and_missing(tmp_path: Path) -> None:
    packages = write_packages(tmp_path / "packages", chunks=3)
    (packages / TENSORRT / "chunk_002.bin").unlink()
    (library,) = libraries(packages)
    chunks = library.chunks(["chunk_000.bin"], False, "")
    assert chunks.waiting == ("chunk_001.bin",)
    assert chunks.missing == ("chunk_002.bin",)


def test_library_unpacks_per_chunk_and_verifies(tmp_path: Path) -> None:
    (library,) = libraries(write_packages(tmp_path / "packages", chunks=3))
    for name in reversed(list(library.sha256)):
        assert unpack(library, "verify", tmp_path / "to") != ""
        assert unpack(library, "add", tmp_path / "to", name) == ""
    assert unpack(library, "verify", tmp_path / "to") == ""
    (tmp_path / "to" / "site" / "made_up_library" / "part_1.py").write_text("VALUE = 3\n")
    assert "1 bad" in unpack(library, "verify", tmp_path / "to")


def test_chunks_of_the_real_packer_are_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packer = Path(os.environ.get("DRN_REAL_DATA", "/absent")).parent / "tools" / "pack_offline.py"
    if not packer.is_file():
        pytest.skip("the packer is not here; set DRN_REAL_DATA to a directory beside whose parent is tools/")
    real = load_module(packer)
    # Its worker processes find its functions by this name.
    monkeypatch.setitem(sys.modules, "pack_offline", real)
    stage, out = tmp_path / "stage", tmp_path / "packages" / TENSORRT
    for number in range(3):
        path = stage / "site" / "made_up_library" / f"part_{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {os.urandom(20_000).hex()}\nVALUE = {number}\n")
    out.mkdir(parents=True)
    real.pack(stage, out, 30_000, 1, 1, "export PYTHONPATH={dest}/site")
    (library,) = libraries(tmp_path / "packages")
    assert len(library.sha256) > 1
    for name in library.sha256:
        assert unpack(library, "add", tmp_path / "to", name) == ""
    assert unpack(library, "verify", tmp_path / "to") == ""
    variables, python = environment(library, tmp_path / "to")
    assert python == ""
    line = [sys.executable, "-c", "import made_up_library.part_2 as p; print(p.VALUE)"]
    result = subprocess.run(line, env={**os.environ, **variables}, capture_output=True, text=True, check=True)
    assert result.stdout == "2\n"


def test_library_environment_uses_bundled_python(tmp_path: Path) -> None:
    use = (
        "export PYTHONHOME={dest}/py39/usr PYTHONPATH={dest}/site LD_LIBRARY_PATH={dest}/a:{dest}/b"
        "  # then {dest}/py39/usr/bin/python3.9"
    )
    library = ChunkedLibrary(TENSORRT, tmp_path, {}, use)
    assert library.python == "3.9"
    variables, python = environment(library, Path("/to"))
    assert python == "/to/py39/usr/bin/python3.9"
    assert variables == {"PYTHONHOME": "/to/py39/usr", "PYTHONPATH": "/to/site", "LD_LIBRARY_PATH": "/to/a:/to/b"}


def test_bundled_python_without_wheels_is_rejected(tmp_path: Path) -> None:
    packages = write_packages(tmp_path / "packages")
    write_chunks(packages / TENSORRT, 2, "export PYTHONHOME={dest}  # then {dest}/bin/python3.9")
    with raises(GroundingError, "no_wheels"):
        check_whole(packages, PYTHON)
    write_wheel(packages / "wheels-3.9", "other", {"other.py": ""})
    assert check_whole(packages, PYTHON)


def test_install_unpacks_only_absent_wheels(tmp_path: Path) -> None:
    packages = write_packages(tmp_path / "packages")
    write_wheel(packages / f"wheels-{PYTHON}", "Other_Wheel", {"other_wheel.py": "", "o.data/scripts/other": "no"})
    site = tmp_path / "site"
    assert install(wheels(packages, PYTHON), site, {"made-up-wheel"}) == ["other-wheel"]
    assert (site / "other_wheel.py").is_file()
    assert not (site / "made_up_wheel.py").exists()
    assert not (site / "o.data").exists()
    # Again, as after a call that was killed half-way.
    assert install(wheels(packages, PYTHON), site, ()) == ["other-wheel", "made-up-wheel"]
    assert (site / "made_up_wheel.py").is_file()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_upload_plan_sends_each_file_once_smallest_chunk_first(tmp_path: Path) -> None:
    packages = write_packages(tmp_path / "packages", chunks=4)
    sizes = (5000, 200, 9000, 7000)
    for number, size in enumerate(sizes):
        (packages / TENSORRT / f"chunk_{number:03d}.bin").write_bytes(os.urandom(size))
    content = json.loads((packages / TENSORRT / "manifest.json").read_text())
    for name, entry in content["chunks"].items():
        entry["sha256"] = hashlib.sha256((packages / TENSORRT / name).read_bytes()).hexdigest()
    content["use"] = "export A={dest}  # then {dest}/bin/python3.9"
    (packages / TENSORRT / "manifest.json").write_text(json.dumps(content))
    write_wheel(packages / "wheels-3.9", "other", {"other.py": os.urandom(3000).hex()})
    groups = calls(packages, PYTHON, 14_000)
    chunks = [path.name for group in groups for path in group if path.suffix == ".bin"]
    assert chunks == ["chunk_001.bin", "chunk_000.bin", "chunk_003.bin", "chunk_002.bin"]
    assert packages / f"wheels-{PYTHON}" in groups[0]
    assert sum(packages / "wheels-3.9" in group for group in groups) == 1
    assert all(total_bytes(group) <= 14_000 for group in groups)


def test_collect_fetches_only_needed_and_absent_wheels(tmp_path: Path) -> None:
    needs = {
        "first": ("second>=2", "numpy", "third; python_version < '3.10'", "fourth; extra == 'more'"),
        "second": ("First", "fifth; sys_platform == 'win32'"),
        "third": (),
    }
    requested: list[str] = []

    def fetch(requirement: str) -> Path:
        requested.append(requirement)
        name = requirement.split(">")[0]
        return write_wheel(tmp_path, name, {}, needs[name])

    gpu_packages.collect(["first"], ["numpy"], "3.12", fetch)
    assert requested == ["first", "second>=2"]
    requested.clear()
    gpu_packages.collect(["first"], ["numpy"], "3.9", fetch)
    assert requested == ["first", "second>=2", "third"]


def test_pins_match_installed_versions() -> None:
    assert gpu_packages.pinned("docstring-parser>=0.16").startswith("docstring_parser==")
    assert gpu_packages.pinned("no-such-package>=1") == "no-such-package>=1"


def test_wheels_cover_the_requirements_of_all_legs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]

    def missing(extras: Iterable[str], *available: Iterable[str]) -> set[str]:
        lists = [project["dependencies"], *(project["optional-dependencies"][name] for name in extras)]
        needed = {normalized(Requirement(line).name) for requirements in lists for line in requirements}
        # Legs read no YAML, and compare no layers.
        return needed - {"pyyaml", "polygraphy"} - {normalized(name) for names in available for name in names}

    assert missing(("cpu", "train", "export", "engine"), gpu_packages.ROOTS, gpu_packages.PRESENT) == set()
    # The Python for TensorRT 8.6 has no torch; the graphs were exported before.
    beside = (gpu_packages.ROOTS_BESIDE_TENSORRT, gpu_packages.PRESENT_BESIDE_TENSORRT)
    assert missing(("cpu", "engine"), *beside) == set()


def test_failed_download_leaves_no_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(requirement: str) -> Path:
        raise GroundingError("It could not be downloaded.", code="download_failed")

    monkeypatch.setattr(gpu_packages, "downloader", lambda folder, python, pin: failing)
    assert gpu_packages.main(["--output", str(tmp_path / "packages")]) == 2
    assert list((tmp_path / "packages").iterdir()) == []
    assert gpu_packages.main(["--output", str(tmp_path / "other"), "--pack", str(tmp_path / "absent.py")]) == 2
    assert not (tmp_path / "other").exists()
