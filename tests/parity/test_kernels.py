"""Test the error of other kernels on a GPU: a graph in ONNX Runtime against the engine built from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.engine.profiles import SizeRange
from export.parity.parity_result import AccuracyBudget, violations
from runtime.backends.cuda_driver import Cuda
from runtime.core.errors import DeviceError
from tests.parity.models import parity


def need_gpu() -> None:
    """Skip with the reason if no engine can be built and run."""
    from export.engine.builder import unavailable_reason

    reason = unavailable_reason("tensorrt")
    if reason:
        pytest.skip(reason)
    try:
        Cuda()
    except DeviceError as error:
        pytest.skip(str(error))


@pytest.mark.gpu
@pytest.mark.trt
@pytest.mark.parametrize("batch", [(1, 8, 32), (2, 4, 7)], ids=["one and several", "several alone"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_engine_on_gpu_agrees_with_converted_graph(
    models: Path, planted: Path, tmp_path: Path, precision: str, batch: SizeRange
) -> None:
    need_gpu()
    from export.build_engine import build_engine

    engine = build_engine(
        models / "drn.onnx",
        precision=precision,
        target="tensorrt",
        batch=batch,
        output=tmp_path / f"drn.{precision}.engine",
        # Each engine for short queries is another build; other tests check them.
        unroll=(0,),
    )
    graph = tmp_path / f"drn.{precision}.onnx"
    actual = parity(graph, engine, planted, "train", device="auto")
    assert all(error.not_finite == 0 for error in actual.heads.values())
    assert violations(actual, AccuracyBudget.of(precision, max_drop=1.1)) == []
