"""Test `benchmarks.cpu`: the matrix product and its rates."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.machine_rates import Gemm, packed_product
from tests import tolerances


def test_packed_product_equals_matrix_product() -> None:
    rng = np.random.default_rng(0)
    left, right = rng.random((5, 24), np.float32), rng.random((24, 7), np.float32)
    session = packed_product(right, 1)
    (actual,) = session.run(None, {"left": left})
    np.testing.assert_allclose(actual, left @ right, rtol=tolerances.HEADS)
    assert session.get_session_options().intra_op_num_threads == 1


def test_rates_are_multiply_adds_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gemm, "SIZES", (4, 6, 5))
    monkeypatch.setattr(Gemm, "READ", 1 << 12)
    gemm = Gemm(1)
    for run in (*gemm.runs.values(), *gemm.reading.values()):
        run(0)
    assert gemm.rate({"GEMM": 0.5, "GEMM, packed": 0.25}) == math.prod((4, 6, 5)) / 0.5
    assert gemm.rate({"GEMM": 0.5, "GEMM, packed": 0.25}, "GEMM, packed") == 4 * 6 * 5 / 0.25
