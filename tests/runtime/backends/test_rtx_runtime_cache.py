"""Test `runtime.backends.rtx_runtime_cache`: TensorRT-RTX compiles the kernels of a plan once."""

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
from tests.raising import records
from tests.runtime.engine_bench import Bench, Graphs, batch_of

RTX = "1.7.1.116"


@pytest.fixture
def bench(tmp_path: Path, graphs: Graphs) -> Bench:
    return Bench(tmp_path, graphs, RTX)


@pytest.fixture
def plan(bench: Bench, tmp_path: Path) -> Path:
    bench.whole(compute_capabilities=["9.0"]).close()
    return tmp_path / "drn.fp32.engine"


def compiled(bench: Bench, run: Callable[[], Any]) -> int:
    """Return the number of kernels that TensorRT-RTX compiles during a call."""
    before = bench.library.compiled
    run()
    return bench.library.compiled - before


def used(bench: Bench, plan: Path) -> int:
    """Open a plan, run two queries, close it, and return the number of compiled kernels."""
    backend = bench.open(plan)

    def run() -> None:
        for lengths in ([3], [5, 5]):
            bench.check(backend, batch_of(lengths))

    count = compiled(bench, run)
    backend.close()
    return count


def test_second_process_reuses_the_kernel_cache(bench: Bench, plan: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert used(bench, plan) == 2
    content = cache_path(plan).read_bytes()
    assert used(bench, plan) == 0
    assert cache_path(plan).read_bytes() == content
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [path.name for path in plan.parent.glob("*cache*")] == ["drn.fp32.engine.cache"]


def test_contexts_of_an_engine_share_their_kernels(bench: Bench) -> None:
    backend = bench.whole()
    backend.run(batch_of([3]))
    backend._network.contexts.release()
    assert compiled(bench, lambda: backend.run(batch_of([3]))) == 0


def test_each_engine_of_a_pair_has_its_own_kernel_cache(bench: Bench, tmp_path: Path) -> None:
    pair = bench.pair(unroll=(6,))
    Grounder(pair).warm((1, 2), (3, 8))
    # The caches are written after the warm-up, so that they survive the kill of a process.
    assert len(list(tmp_path.glob("*.engine.cache"))) == 3
    pair.close()
    again = bench.open(tmp_path / "drn.query.engine")
    assert compiled(bench, lambda: Grounder(again).warm((1, 2), (3, 8))) == 0


@pytest.mark.parametrize(
    "damage",
    [
        *({"sha256": "0" * 64}, {"plan": "0" * 64}, {"format": "drn-runtime-cache/2"}),
        *({"library": "tensorrt_rtx 1.6.0"}, {"gpu": "NVIDIA RTX 4090 (8.9)"}),
        *(b"", b"null\nkernels", b"[" * 70000, b"\xff\xfe\n", b'{"sha256": 1}\n'),
    ],
)
def test_damaged_or_foreign_kernel_cache_is_replaced(
    bench: Bench, plan: Path, caplog: pytest.LogCaptureFixture, damage: dict[str, str] | bytes
) -> None:
    used(bench, plan)
    content = cache_path(plan).read_bytes()
    header, kernels = content.split(b"\n", 1)
    if isinstance(damage, dict):
        damage = json.dumps({**json.loads(header), **damage}).encode() + b"\n" + kernels
    cache_path(plan).write_bytes(damage)
    caplog.clear()
    assert used(bench, plan) == 2
    assert len(records(caplog, logging.WARNING, cache_path(plan))) == len(caplog.records) == 1
    assert cache_path(plan).read_bytes() == content
    assert used(bench, plan) == 0


def test_kernels_of_another_gpu_are_not_loaded(bench: Bench, plan: Path, caplog: pytest.LogCaptureFixture) -> None:
    used(bench, plan)
    bench.library.cuda_major = 14
    assert used(bench, plan) == 2
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1
    other = Bench(plan.parent, bench.graphs, RTX)
    other.driver = Driver("NVIDIA GH200")
    other.library, other.cuda = Library(other.driver, RTX), Cuda(other.driver)
    assert used(other, plan) == 2


def test_unwritable_cache_leaves_a_working_model(bench: Bench, plan: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache_path(plan).unlink(missing_ok=True)
    cache_path(plan).mkdir()
    assert used(bench, plan) == 2
    assert any(str(cache_path(plan)) in record.getMessage() for record in caplog.records)
    assert not bench.driver.held()


def test_tensorrt_engines_write_no_kernel_cache(tmp_path: Path, graphs: Graphs) -> None:
    backend = Bench(tmp_path, graphs, "11.4.0.106").whole()
    Grounder(backend).warm((1,), (3,))
    backend.close()
    assert not list(tmp_path.glob("*.cache"))


def test_fake_runtime_cache_has_only_real_names() -> None:
    library = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    from benchmarks.fake_tensorrt import RuntimeCache, RuntimeConfig

    for double, real in ((RuntimeCache, library.IRuntimeCache), (RuntimeConfig, library.IRuntimeConfig)):
        names = {name for name in dir(double) if not name.startswith("_")} - {"compile"}
        assert names <= set(dir(real))
