"""pyproject.toml: the requirements of each extra, and the contents of the wheel."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import urllib.request
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.documented import EXTRAS, PROJECT, ROOT

RUNTIMES = {"cpu": "onnxruntime", "gpu": "onnxruntime-gpu"}
OTHERS = sorted(set(EXTRAS) - set(RUNTIMES))


def closure(requirements: list[str]) -> set[str]:
    """Return the names of all packages that requirements bring, as far as the packages are installed here."""
    names: set[str] = set()
    waiting = [(Requirement(text), "") for text in requirements]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        if name in names:
            continue
        names.add(name)
        try:
            below = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        waiting += [
            (Requirement(text), name_of_extra) for text in below for name_of_extra in requirement.extras or {""}
        ]
    return names


# A combination brings what its extras bring one by one.
@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("others", [(), *((name,) for name in OTHERS), tuple(OTHERS)])
def test_combination_of_extras_has_one_onnxruntime(runtime: str, others: tuple[str, ...]) -> None:
    requirements = PROJECT["dependencies"] + [text for name in (runtime, *others) for text in EXTRAS[name]]
    assert closure(requirements) & set(RUNTIMES.values()) == {RUNTIMES[runtime]}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built from a copy of the packages."""
    pytest.importorskip("setuptools", reason="builds the wheel")
    source, wheels = (tmp_path_factory.mktemp(name) for name in ("source", "wheels"))
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("runtime", "train", "export", "calib"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    line = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*line, "--wheel-dir", wheels, source], check=True)
    return next(wheels.glob("drn_deploy-*.whl"))


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A virtual environment with the wheel and the requirements of this Python. Uninstalling leaves no file of it."""
    root = tmp_path_factory.mktemp("environment")
    venv.create(root, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--python", str(root / "bin" / "python")]
    (site,) = root.glob("lib/python*/site-packages")
    before = set(root.rglob("*"))
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--no-compile", wheel], check=True)
    requirements = site / "requirements.pth"
    requirements.write_text(f"{sysconfig.get_path('purelib')}\n")
    yield root
    requirements.unlink()
    subprocess.run([*pip, "uninstall", "--yes", "drn-deploy"], check=True)
    assert set(root.rglob("*")) == before


def test_wheel_contains_packages_and_package_data(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    sources = [path for name in ("runtime", "train", "export", "calib") for path in (ROOT / name).rglob("*.py")]
    data = [
        path
        for folder in ("runtime/service/page", "export/parity")
        for path in (ROOT / folder).iterdir()
        if path.suffix not in (".py", "")
    ]
    assert names == {path.relative_to(ROOT).as_posix() for path in (*sources, *data)}
    assert len(data) > 2


def test_wheel_runs_beside_modules_of_the_same_names(environment: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="ONNX Runtime runs the model")
    pytest.importorskip("fastapi", reason="the service needs the extra [serve]")
    with tarfile.open(ROOT / "tests" / "artifacts" / "v0.1.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    for name in ("train.py", "export.py", "runtime.py"):
        (tmp_path / name).write_text("raise SystemExit(99)")
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    variables.pop("PYTHONPATH", None)

    def drn(*words: str, **options: Any) -> subprocess.Popen[str]:
        line = [environment / "bin" / "drn", *words, "--model", "drn.onnx", "--data", "data"]
        return subprocess.Popen(line, cwd=tmp_path, env=variables, text=True, stdout=subprocess.PIPE, **options)

    imported = subprocess.check_output(
        [environment / "bin" / "python", "-Pc", "import train; print(train.__file__)"], env=variables
    )
    assert Path(imported.decode().strip()).is_relative_to(environment)
    query = ("--video", "SIM00001", "--query", "person starts taking the book")
    for words in (["infer", *query, "--format", "json"], ["evaluate", "--output", "report.json"]):
        process = drn(*words, stderr=subprocess.PIPE)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert "Next:  drn " in errors
        if words[0] == "infer":
            assert json.loads(output)[0]["video"] == "SIM00001"
    assert json.loads((tmp_path / "report.json").read_text())["queries"] > 0
    service = drn("serve", "--port", "0", "--uploads", "uploads", stderr=subprocess.DEVNULL)
    assert service.stdout is not None
    address = service.stdout.readline().strip().rstrip("/")
    with urllib.request.urlopen(address, timeout=30) as reply:
        assert b"<html" in reply.read()
    service.terminate()
    # Exit code of a service that SIGTERM ended; see docs/serving.md.
    assert service.wait(30) == 0


def test_version_is_that_of_the_project() -> None:
    import runtime

    assert runtime.__version__ == PROJECT["version"]
