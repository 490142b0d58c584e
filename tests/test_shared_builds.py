"""Traced graphs are shared by networks of one structure, with any vocabulary."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from export.tracing.tracer import export_model
from runtime.core.batch import INPUT_NAMES
from tests import tolerances
from tests.export.conftest import TINY, lively, manifest, random_inputs
from tests.train.training.narrow import narrow_backbone

__all__ = ["narrow_backbone"]


@pytest.mark.parametrize("words", [TINY.vocab_size, 33])
def test_shared_trace_gives_the_heads_of_the_network(words: int) -> None:
    config = dataclasses.replace(TINY, vocab_size=words)
    model, inputs = lively(config), random_inputs(config, [4, 9, 1, 12])
    session: Any = onnxruntime.InferenceSession(export_model(model, manifest(config)).SerializeToString())
    actual = session.run(None, dict(zip(INPUT_NAMES, (tensor.numpy() for tensor in inputs), strict=True)))
    with torch.no_grad():
        expected = model(*inputs)
    for head, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(head, other.numpy(), rtol=0, atol=tolerances.EXPORTED * float(other.abs().max()))
