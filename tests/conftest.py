"""What tests share: goldens, the real annotations where they are at hand, and a planted data set."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

GOLDEN = Path(__file__).parent / "golden"
# Of directories whose tests all need an extra: what it brings, and its name.
NEEDED = {
    Path(__file__).parent / "runtime" / "service": (
        ("fastapi", "uvicorn", "python_multipart", "prometheus_client"),
        "the service needs the extra [serve]",
    ),
    Path(__file__).parent / "runtime" / "triton": (
        ("tritonclient", "grpc", "geventhttpclient"),
        "tritonclient has Triton's definitions (pip install '.[triton]')",
    ),
}


class Lacking(pytest.Module):
    """A file of tests that is not even imported. A conftest.py that skips would end pytest with a traceback."""

    def collect(self) -> list[pytest.Item]:
        pytest.skip(NEEDED[self.path.parent][1], allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    names, _ = NEEDED.get(module_path.parent, ((), ""))
    lacks = any(importlib.util.find_spec(name) is None for name in names)
    return Lacking.from_parent(parent, path=module_path) if lacks else None


@pytest.fixture(scope="session")
def golden() -> Path:
    """The directory of reference numbers, made with mmaction2's own code."""
    return GOLDEN


@pytest.fixture(scope="session")
def recipe() -> ModuleType:
    """The module that makes the goldens' weights and features from a seed."""
    spec = importlib.util.spec_from_file_location("golden_weights", GOLDEN / "weights.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def real_data() -> Path:
    """A directory of real annotations (DRN_REAL_DATA, or shared/data beside the repository); skips where absent."""
    place = Path(os.environ.get("DRN_REAL_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (place / "charades_sta" / "Charades_sta_train.txt").is_file():
        pytest.skip("the real annotations are not here; set DRN_REAL_DATA to a directory that holds charades_sta/")
    return place


@pytest.fixture(scope="session")
def real_videos() -> Path:
    """A directory of three real videos, DRN_REAL_DATA/videos; skips where absent."""
    place = Path(os.environ.get("DRN_REAL_DATA", Path(__file__).parents[2] / "shared" / "data")) / "videos"
    if not (place / "univtg_charades.mp4").is_file():
        pytest.skip("the real videos are not here; set DRN_REAL_DATA to a directory that holds videos/")
    return place


@pytest.fixture(scope="session")
def faults() -> Path:
    """A directory of small damaged inputs, DRN_REAL_DATA/faults; skips where absent."""
    place = Path(os.environ.get("DRN_REAL_DATA", Path(__file__).parents[2] / "shared" / "data")) / "faults"
    if not place.is_dir():
        pytest.skip("the damaged inputs are not here; set DRN_REAL_DATA to a directory that holds faults/")
    return place


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small made-up data set with simulated features, D = 32."""
    from train.simulate import simulate

    directory = tmp_path_factory.mktemp("planted") / "data"
    simulate(directory, feature_dim=32, videos=24, difficulty="easy", seed=1)
    return directory


@pytest.fixture(scope="session")
def models(planted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `drn.pt` and `drn.onnx` of a small network that learnt the planted data set."""
    from tests.parity.models import write_models

    return write_models(tmp_path_factory.mktemp("models"), planted)


@pytest.fixture
def default_signals() -> Iterator[None]:
    """Give SIGHUP and SIGINT their usual effect, which they lack under nohup and in the background of a shell."""
    usual = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
