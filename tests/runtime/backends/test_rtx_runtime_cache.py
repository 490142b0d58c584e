"""`runtime.backends.rtx_runtime_cache`: TensorRT-RTX compiles a plan's kernels once, and loads none of another plan."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fake_tensorrt import Driver, Library
from runtime.backends.cuda_driver import Cuda
from runtime.backends.rtx_runtime_cache import cache_path
from runtime.grounding.grounder import Grounder
from tests.runtime.backends.test_tensorrt_backend import Bench, Graphs, assert_same, batch_of, graphs, reference

__all__ = ["graphs"]

RTX = "1.7.1.116"


@pytest.fixture
def bench(tmp_path: Path, graphs: Graphs) -> Bench:
    return Bench(tmp_path, graphs, RTX)


def compiled(bench: Bench, run: Callable[[], Any]) -> int:
    before = bench.library.compiled
    run()
    return bench.library.compiled - before


def used(bench: Bench, plan: Path) -> int:
    """Open a plan, answer two queries with it, close it, and return how many kernels were compiled."""
    backend = bench.open(plan)

    def run() -> None:
        for lengths in ([3], [5, 5]):
            assert_same(backend.run(batch_of(lengths)), reference(bench.graphs, batch_of(lengths)))

    count = compiled(bench, run)
    backend.close()
    return count


def test_second_process_reuses_the_kernel_cache(bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bench.whole().close()
    plan = tmp_path / "drn.fp32.engine"
    assert used(bench, plan) == 2
    content = cache_path(plan).read_bytes()
    assert used(bench, plan) == 0
    assert cache_path(plan).read_bytes() == content
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert {path.name for path in tmp_path.iterdir() if "cache" in path.name} == {"drn.fp32.engine.cache"}


def test_contexts_of_an_engine_share_their_kernels(bench: Bench) -> None:
    backend = bench.whole()
    backend.run(batch_of([3]))
    backend._network.contexts.release()
    assert compiled(bench, lambda: backend.run(batch_of([3]))) == 0


def test_each_engine_of_a_pair_has_its_own_kernel_cache(bench: Bench, tmp_path: Path) -> None:
    pair = bench.pair(unroll=(6,))
    Grounder(pair).warm((1, 2), (3, 8))
    # Written when the model is warm, so that a process that is killed leaves them.
    assert len(list(tmp_path.glob("*.engine.cache"))) == 3
    pair.close()
    again = bench.open(tmp_path / "drn.query.engine")
    assert compiled(bench, lambda: Grounder(again).warm((1, 2), (3, 8))) == 0


def damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"!")


def header_of(**changed: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        header, content = path.read_bytes().split(b"\n", 1)
        path.write_bytes(json.dumps({**json.loads(header), **changed}).encode() + b"\n" + content)

    return change


@pytest.fixture
def plan(bench: Bench, tmp_path: Path) -> Path:
    bench.whole().close()
    return tmp_path / "drn.fp32.engine"


@pytest.mark.parametrize(
    "change",
    [
        damaged,
        header_of(plan="0" * 64),
        header_of(library="tensorrt_rtx 1.6.0"),
        header_of(gpu="NVIDIA RTX 4090 (8.9)"),
        header_of(format="drn-runtime-cache/2"),
        *(
            lambda path, content=content: path.write_bytes(content)
            for content in (b"", b"\n", b"[]\n", b"null\nkernels", b"[" * 70000, b"\xff\xfe\n", b'{"sha256": 1}\n')
        ),
        None,
    ],
)
def test_damaged_or_foreign_kernel_cache_is_replaced(
    bench: Bench, plan: Path, caplog: pytest.LogCaptureFixture, change: Callable[[Path], None] | None
) -> None:
    used(bench, plan)
    content = cache_path(plan).read_bytes()
    caplog.clear()
    if change is None:
        bench.library.cuda_major = 14
    else:
        change(cache_path(plan))
    assert used(bench, plan) == 2
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    if change is not None:
        assert str(cache_path(plan)) in warning.getMessage()
        assert cache_path(plan).read_bytes() == content
    assert used(bench, plan) == 0


def test_kernels_of_another_gpu_are_not_loaded(bench: Bench, tmp_path: Path) -> None:
    plan = tmp_path / "drn.fp32.engine"
    bench.whole(compute_capabilities=["9.0"]).close()
    used(bench, plan)
    other = Bench(tmp_path, bench.graphs, RTX)
    other.driver = Driver("NVIDIA GH200")
    other.library, other.cuda = Library(other.driver, RTX), Cuda(other.driver)
    assert used(other, plan) == 2


def test_unwritable_cache_directory_leaves_a_working_model(
    bench: Bench, plan: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache_path(plan).unlink(missing_ok=True)
    cache_path(plan).mkdir()
    assert used(bench, plan) == 2
    assert any(str(cache_path(plan)) in record.getMessage() for record in caplog.records)
    assert not bench.driver.held()


@pytest.mark.parametrize("version", ["8.6.1", "10.16.1.11", "11.4.0.106"])
def test_tensorrt_engines_write_no_kernel_cache(tmp_path: Path, graphs: Graphs, version: str) -> None:
    bench = Bench(tmp_path, graphs, version)
    backend = bench.whole()
    Grounder(backend).warm((1,), (3,))
    backend.close()
    assert not list(tmp_path.glob("*.cache"))


def test_fake_runtime_cache_has_only_real_names() -> None:
    library = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    from benchmarks.fake_tensorrt import RuntimeCache, RuntimeConfig

    for double, real in ((RuntimeCache, library.IRuntimeCache), (RuntimeConfig, library.IRuntimeConfig)):
        names = {name for name in dir(double) if not name.startswith("_")} - {"compile"}
        assert names <= set(dir(real))
