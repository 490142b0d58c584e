"""The third error: what other kernels cost. A twin in ONNX Runtime against the engine built from it; needs a GPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import onnx
import pytest

from export.parity import Budget, verdict
from runtime import GroundingError
from tests.parity.models import parity, save_twin


def need_gpu(models: Path) -> None:
    """Skip, with the reason, where no engine can be built and run."""
    if not any(importlib.util.find_spec(name) for name in ("tensorrt", "tensorrt_rtx")):
        pytest.skip("neither TensorRT nor TensorRT-RTX is installed")
    if importlib.util.find_spec("export.builder") is None:
        pytest.skip("export/builder.py, which builds engines, is missing")
    import torch

    if not torch.cuda.is_available():
        pytest.skip("an engine runs on a CUDA GPU, and there is none")


@pytest.mark.gpu
@pytest.mark.trt
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_engine_answers_as_its_twin(models: Path, planted: Path, tmp_path: Path, precision: str) -> None:
    need_gpu(models)
    from export.build_engine import build_engine

    twin = models / "drn.onnx"
    if precision == "fp16":
        from export.precision import to_half

        twin = save_twin(to_half(onnx.load(twin), "fp16"), twin, tmp_path / "twin.onnx", "fp16")
    try:
        engine = build_engine(twin, precision=precision, target="tensorrt", output=tmp_path / "drn.engine")
    except GroundingError as error:
        pytest.skip(f"no engine can be built here: {error}")
    found = parity(twin, engine, planted, "train", device="auto")
    assert all(error.not_finite == 0 for error in found.heads.values())
    assert verdict(found, Budget.of(precision, max_drop=1.1)) == []
