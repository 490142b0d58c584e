"""Test `runtime.backends.triton_backend`: the configuration of the front, and calls of networks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import Grounder
from runtime.backends import open_backend
from runtime.backends.batch_shapes import padded_length
from runtime.backends.triton_backend import FrontConfig, TritonBackend, open_networks
from runtime.core.batch import Batch
from runtime.core.errors import ModelFileError, ShapeError
from tests.export.conftest import TINY, manifest, random_inputs
from tests.raising import raises
from tests.runtime.number_checks import check_video_index, check_words_and_lengths
from tests.runtime.triton.conftest import QUERIES, video

ABOUT = FrontConfig(manifest(TINY), "drn_network", batch=4)


def test_front_config_survives_json() -> None:
    for about in (ABOUT, dataclasses.replace(ABOUT, video_network="drn_video", videos=7, encoded_together=3)):
        assert FrontConfig.from_json(about.to_json(), "here") == about


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "invalid_json"),
        ("[]", "damaged_file"),
        ("{}", "unknown_format"),
        (json.dumps({"format": "drn-triton/2"}), "unknown_format"),
        (json.dumps({"format": "drn-triton/1", "manifest": {}}), "unknown_format"),
        (json.dumps({**json.loads(ABOUT.to_json()), "surprise": 1}), "digest_mismatch"),
    ],
)
def test_damaged_or_other_front_config_is_rejected(text: str, code: str) -> None:
    with raises(ModelFileError, code, "about.json"):
        FrontConfig.from_json(text, "about.json")


def test_padded_length_rounds_up_to_few_sizes() -> None:
    assert [padded_length(n, 64) for n in (1, 4, 5, 7, 9, 13, 17, 33, 64)] == [4, 4, 6, 8, 12, 16, 24, 48, 64]
    assert padded_length(9, 10) == 10
    assert padded_length(2, 3) == 3


class Network:
    """The unsplit network in this process, as a model of Triton."""

    def __init__(self, grounder: Grounder) -> None:
        self.backend: Any = grounder.backend
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, model: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]) -> list[np.ndarray]:
        assert model == "drn_network"
        self.shapes.append(inputs["query_tokens"].shape)
        flat = {**inputs, "query_length": inputs["query_length"][:, 0]}
        return self.backend._session.run(outputs, flat)


def test_padded_and_split_batches_equal_direct_results(direct: Grounder) -> None:
    network = Network(direct)
    served = Grounder(TritonBackend(ABOUT, network))
    pairs = [(video(20 + seed, seed), query) for seed in range(3) for query in QUERIES]
    for actual, expected in zip(served.ground_batch(pairs, 3), direct.ground_batch(pairs, 3), strict=True):
        for ours, theirs in zip(actual, expected, strict=True):
            assert vars(ours) == pytest.approx(vars(theirs), abs=1e-5)
    assert network.shapes == [(4, 6), (4, 6), (4, 6)]


class PairNetworks:
    """The parts of a split network in this process, as models of Triton."""

    def __init__(self, query_part: Path) -> None:
        pair: Any = open_backend(query_part, "cpu", 1)
        self.parts = {"drn_query": pair._query, "drn_video": pair._video}

    def __call__(self, model: str, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]) -> list[np.ndarray]:
        return self.parts[model].run(outputs, inputs)


def test_numbers_out_of_range_are_rejected(direct: Grounder, query_part: Path) -> None:
    about = dataclasses.replace(ABOUT, network="drn_query", video_network="drn_video")
    pair = open_networks(about, PairNetworks(query_part))
    batch = Batch(*(tensor.numpy() for tensor in random_inputs(TINY, [4, 4])))
    for backend in (open_networks(ABOUT, Network(direct)), pair):
        check_words_and_lengths(backend, batch)
    check_video_index(pair, batch)


@pytest.mark.parametrize("length", [1, 3, 5, 7, 9])
def test_padded_query_has_same_heads(direct: Grounder, length: int) -> None:
    batch = Batch(*(tensor.numpy() for tensor in random_inputs(TINY, [length, max(1, length - 2)])))
    network = Network(direct)
    padded = TritonBackend(ABOUT, network).run(batch)
    assert network.shapes[0][1] == padded_length(length, 12) > length
    for name, expected in vars(direct.backend.run(batch)).items():
        np.testing.assert_allclose(getattr(padded, name), expected, atol=1e-6)


def test_too_long_query_is_rejected(direct: Grounder) -> None:
    batch = Batch(*(tensor.numpy() for tensor in random_inputs(TINY, [13])))
    with raises(ShapeError, "query_length_out_of_range", 13, 1, 12):
        open_networks(ABOUT, Network(direct)).run(batch)
