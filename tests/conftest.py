"""Define what tests share: golden files, data that may not be distributed, a small data set, and its network."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.util
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from runtime.core.cli import command
from runtime.core.errors import GroundingError, printable_line
from tests.file_modules import load_module
from tests.next_commands import next_commands_checked
from tests.shared_builds import build_once, can_trace, run_directory, traced_once
from tests.written import check_written, file_versions, logged_lines

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


# Files that take longest, longest first. With these at the front, two processes end at nearly the same time.
SLOWEST = (
    "test_build_engine.py", "test_trainer.py", "test_ray_runner.py", "test_readme.py", "test_gpu.py", "test_signals.py",
    "test_next_commands.py", "test_fuzzing.py", "test_rtx_builds.py", "test_tensorrt_backend.py",
    "test_distributed.py", "test_pages.py",
    "test_your_own_video_docs.py", "test_verify.py", "test_page.py", "test_quickstart.py",
    "test_packaging.py", "test_damage.py", "test_extractor_engine.py", "test_leg_tensorrt.py",
    "test_segments.py", "test_split_model.py", "test_warm_up.py", "test_to_onnx.py", "test_contracts.py",
    "test_unroll_lstm.py", "test_faults.py", "test_uploads.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {name: rank for rank, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(SLOWEST)))


def pytest_collection() -> None:
    gc.disable()


def pytest_collection_finish() -> None:
    """Exempt the modules and tests loaded so far from garbage collection, which takes 4 % of the time otherwise."""
    gc.freeze()
    gc.enable()


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
    return load_module(GOLDEN / "weights.py")


def _external(folder: str, needed: str = "") -> Path:
    """Return a folder of DRN_REAL_DATA (default: shared/data beside the repository); skip the test without it."""
    root = Path(os.environ.get("DRN_REAL_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (root / folder / needed).exists():
        pytest.skip(f"{folder or 'the annotations'} may not be distributed; set DRN_REAL_DATA to a directory with it")
    return root / folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """A directory of real annotations; skips where absent."""
    return _external("", "charades_sta/Charades_sta_train.txt")


@pytest.fixture(scope="session")
def real_videos() -> Path:
    """A directory of three real videos; skips where absent."""
    return _external("videos", "univtg_charades.mp4")


@pytest.fixture(scope="session")
def i3d_data() -> Path:
    """A directory of public I3D weights and reference features; skips where absent."""
    return _external("i3d", "i3d_kinetics400.npz")


@pytest.fixture(scope="session")
def faults() -> Path:
    """A directory of small damaged inputs; skips where absent."""
    return _external("faults")


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

    return build_once(run_directory(tmp_path_factory) / "models", lambda directory: write_models(directory, planted))


@pytest.fixture(scope="session")
def split_models(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of `models`, with the parts `drn.video.onnx` and `drn.query.onnx` beside them."""
    import onnx

    from calib.graph.split_model import split_graph, write_split_model

    def split(directory: Path) -> None:
        for name in ("drn.pt", "drn.onnx"):
            shutil.copy(models / name, directory)
        write_split_model(*split_graph(onnx.load(directory / "drn.onnx")), directory / "drn.onnx")

    return build_once(run_directory(tmp_path_factory) / "split-models", split)


@pytest.fixture(scope="session", autouse=True)
def checked_next_commands() -> Iterator[None]:
    """Parse every "Next:" line that a test prints in this process with the parser of its command."""
    with next_commands_checked():
        yield


@pytest.fixture(scope="session", autouse=True)
def shared_traces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with traced_once(run_directory(tmp_path_factory)) if can_trace() else contextlib.nullcontext():
        yield


@pytest.fixture(scope="session", autouse=True)
def no_speed_checks() -> Iterator[None]:
    """Let builds in this process skip the timing of `--min-speedup`, which takes seconds; its own tests restore it."""
    with pytest.MonkeyPatch.context() as patch:
        with contextlib.suppress(ImportError):
            from export.build import speed_check

            def measure_nothing(names: tuple[str, str], _: object, min_speedup: float, __: object) -> object:
                return speed_check.SpeedCheck(names[1], "", min_speedup, reason="Tests measure no speed.")

            patch.setattr(speed_check, "measure_speed", measure_nothing)
        yield


@pytest.fixture
def default_signals() -> Iterator[None]:
    """Give SIGHUP and SIGINT their usual effect, which they lack under nohup and in the background of a shell."""
    usual = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        out, err: what it wrote.
        error: the error for which it exited, if it did.
    """

    out: str
    err: str
    error: BaseException | None = None


@pytest.fixture
def run_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """Run a command function on arguments, in this process, and check its exit code and its "Written:" lines."""

    def run(function: Callable[..., Any], *arguments: object, code: int = 0) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        capsys.readouterr()
        before = file_versions(tmp_path)
        with logged_lines() as lines, pytest.raises(SystemExit) as ended:
            command(function)
        captured = capsys.readouterr()
        assert ended.value.code == code, f"{arguments}\n{captured.out}\n{captured.err}"
        # After an error there may be files from which the same command resumes.
        if code != 2:
            check_written(tmp_path, before, lines)
        return Outcome(captured.out, captured.err, ended.value.__context__)

    return run


@pytest.fixture
def refused(run_command: Any) -> Callable[..., GroundingError]:
    """Run a command that must fail with one line on stderr, and return its error for `check_error`."""

    def run(function: Callable[..., Any], *arguments: object) -> GroundingError:
        outcome = run_command(function, *arguments, code=2)
        assert outcome.out == ""
        assert isinstance(outcome.error, GroundingError)
        assert outcome.err == f"error: {printable_line(str(outcome.error))}\n"
        return outcome.error

    return run
