"""pyproject.toml: the requirements of each extra, and the contents of the wheel."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
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
        waiting += [(Requirement(text), wanted) for text in below for wanted in requirement.extras or {""}]
    return names


# A combination brings what its extras bring one by one.
@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("others", [(), *((name,) for name in OTHERS), tuple(OTHERS)])
def test_combination_of_extras_has_one_onnxruntime(runtime: str, others: tuple[str, ...]) -> None:
    requirements = PROJECT["dependencies"] + [text for name in (runtime, *others) for text in EXTRAS[name]]
    assert closure(requirements) & set(RUNTIMES.values()) == {RUNTIMES[runtime]}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the unpacked wheel, built from a copy of the packages."""
    pytest.importorskip("setuptools", reason="builds the wheel")
    source, wheels, target = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "target"))
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("runtime", "train", "export", "calib"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    line = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*line, "--wheel-dir", wheels, source], check=True)
    (wheel,) = wheels.glob("drn_deploy-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def test_wheel_contains_packages_and_package_data(installed: Path) -> None:
    packages = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert packages == {"runtime", "train", "export", "calib"}
    for folder in (Path("runtime", "service", "page"), Path("export", "parity")):
        data = {path.name for path in (ROOT / folder).iterdir() if path.suffix not in (".py", "")}
        assert data
        assert data == {path.name for path in (installed / folder).iterdir() if path.suffix not in (".py", "")}
    sources = {path.relative_to(ROOT) for name in packages for path in (ROOT / name).rglob("*.py")}
    assert sources == {path.relative_to(installed) for path in installed.rglob("*.py")}


def test_installed_drn_runs_beside_modules_of_the_same_names(installed: Path, tmp_path: Path) -> None:
    for name in ("train.py", "export.py", "runtime.py"):
        (tmp_path / name).write_text("raise SystemExit(99)")
    entry = next(installed.glob("*.dist-info")) / "entry_points.txt"
    assert "drn = runtime.core.command_list:main" in entry.read_text()
    program = "import sys; sys.argv[0] = 'drn'; from runtime.core.command_list import main; main()"
    environment = os.environ | {"PYTHONPATH": str(installed)}
    for words in (["doctor"], ["export", "--help"], ["train", "--help"]):
        line = [sys.executable, "-P", "-c", program, *words]
        result = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr


def test_version_is_that_of_the_project() -> None:
    import runtime

    assert runtime.__version__ == PROJECT["version"]
