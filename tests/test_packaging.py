"""pyproject.toml: what each extra installs."""

from __future__ import annotations

import importlib.metadata
import itertools
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
RUNTIMES = {"cpu": "onnxruntime", "gpu": "onnxruntime-gpu"}
OTHERS = sorted(set(EXTRAS) - set(RUNTIMES))
COMBINATIONS = [(), *((name,) for name in OTHERS), *itertools.combinations(OTHERS, 2), tuple(OTHERS)]


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


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(
    "others", [(), *((name,) for name in OTHERS), *itertools.combinations(OTHERS, 2), tuple(OTHERS)]
)
def test_combination_of_extras_has_one_onnxruntime(runtime: str, others: tuple[str, ...]) -> None:
    requirements = PROJECT["dependencies"] + [text for name in (runtime, *others) for text in EXTRAS[name]]
    assert closure(requirements) & set(RUNTIMES.values()) == {RUNTIMES[runtime]}
