"""Test `train.network.initialization`: initial weights, and word vectors from files."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from runtime.core.errors import CheckpointError, GroundingError
from tests.raising import raises, records
from tests.train.conftest import random_inputs
from train.network.initialization import initialize_as_authors, load_glove
from train.network.model import DRN, DRNConfig
from train.training.trainer import fresh_model

WORDS = {f"w{i}": i for i in range(1, 21)}
WIDE = DRNConfig(vocab_size=300, embed_dim=32, feature_dim=64, hidden_dim=64, fpn_dim=64)


def test_fresh_model_is_seeded_without_global_rng_changes(tiny: DRNConfig) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, other, third = (fresh_model(tiny, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["prop_fc.weight"], third["prop_fc.weight"])


def test_fresh_head_matches_the_published_one() -> None:
    model = fresh_model(WIDE, 0)
    head = model.fcos.head
    assert (
        float(head.cls_logits.bias.detach())
        == pytest.approx(-math.log(99), abs=1e-5)
        == pytest.approx(-4.59512, abs=1e-5)
    )
    assert [float(scale.scale.detach()) for scale in head.scales] == [1, 1, 1]
    for module in head.modules():
        if isinstance(module, nn.Conv1d):
            if module.weight.numel() > 1000:
                assert float(module.weight.std().detach()) == pytest.approx(0.01, rel=0.1)
            if module is not head.cls_logits:
                assert not module.bias.any()
    table = model.query_encoder.embedding.weight
    assert not table[0].any()
    assert float(table[1:].std().detach()) == pytest.approx(1, rel=0.1)


@torch.no_grad()
def test_fresh_network_has_low_matching_scores() -> None:
    scores = fresh_model(WIDE, 0).eval()(*random_inputs(WIDE, [4, 2])).matching_logits.sigmoid()
    assert 0.005 < float(scores.min()) <= float(scores.max()) < 0.02


def test_authors_initialization_changes_the_same_weights() -> None:
    published, ours = fresh_model(WIDE, 0), fresh_model(WIDE, 0, initialize_as_authors)
    plain = published.state_dict()
    changed = {name for name, tensor in ours.state_dict().items() if not torch.equal(tensor, plain[name])}
    language = {name for name in plain if name.startswith("query_encoder.") and "embedding" not in name}
    convolutions = {name for name in plain if name.startswith(("backbone_net.", "fpn.")) and name.endswith(".0.weight")}
    assert changed == language | convolutions
    for name, tensor in ours.query_encoder.named_parameters():
        if tensor.ndim == 1:
            assert not tensor.any(), name
        elif not name.startswith("embedding"):
            bound = math.sqrt(6 / sum(tensor.shape))
            assert float(tensor.abs().max().detach()) == pytest.approx(bound, rel=0.1), name
    for name in convolutions:
        weight = ours.state_dict()[name]
        # Kaiming-uniform with a = 1: the square root of 3 over the fan-in.
        assert float(weight.abs().max()) == pytest.approx(math.sqrt(3 / (weight.shape[1] * weight.shape[2])), rel=0.01)


@pytest.fixture
def model(tiny: DRNConfig) -> DRN:
    return fresh_model(tiny, 0)


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def line(word: str, value: object, width: int = 8) -> str:
    return " ".join([word, *[str(value)] * width])


def replaced(matrix: torch.Tensor, value: float) -> torch.Tensor:
    """Return a copy with this value in row 3."""
    other = matrix.clone()
    other[3, 1] = value
    return other


def test_load_glove_sets_vectors_of_known_words(model: DRN, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = model.query_encoder.embedding.weight.detach().clone()
    unknown = [line("elsewhere", 1e38), line("other", 0), line(". . .", 2)]
    path = write(tmp_path / "glove.txt", [line("w3", 0.5), *unknown, line("w20", -1e4)])
    with caplog.at_level(logging.INFO, "drn"):
        assert load_glove(model, path, WORDS) == 2
    table = model.query_encoder.embedding.weight
    assert torch.equal(table[3], torch.full((8,), 0.5))
    assert torch.equal(table[20], torch.full((8,), -1e4))
    others = [row for row in range(21) if row not in (3, 20)]
    assert torch.equal(table[others], before[others])
    assert records(caplog, logging.INFO, 2, 20)
    assert table.requires_grad


def test_load_glove_repeated_word_uses_first(model: DRN, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "glove.txt"
    lines = [line("w3", 1), line("w4", 2), line("w4", 2), line("elsewhere", 3), line("elsewhere", 4)]
    load_glove(model, write(path, lines), WORDS)
    assert not records(caplog, logging.WARNING)
    load_glove(model, write(path, [*lines, line("w3", 5), line("w3", 6)]), WORDS)
    assert torch.equal(model.query_encoder.embedding.weight[3], torch.full((8,), 1.0))
    assert len(records(caplog, logging.WARNING, path, "'w3'", 1, 6, code="duplicate_word_vector")) == 1


def test_load_glove_matrix_sets_vectors_by_row(model: DRN, tmp_path: Path) -> None:
    matrix = torch.randn(21, 8)
    torch.save(matrix, tmp_path / "glove_weights")
    assert load_glove(model, tmp_path / "glove_weights", WORDS) == 20
    table = model.query_encoder.embedding.weight
    assert torch.equal(table[1:], matrix[1:])
    assert not table[0].any()


@pytest.mark.parametrize(
    ("change", "code", "values"),
    [
        (lambda matrix: matrix[1:], "word_vector_shape_mismatch", ((20, 8), (21, 8))),
        (lambda matrix: torch.zeros(21, 9), "word_vector_shape_mismatch", ((21, 9), (21, 8))),
        (lambda matrix: matrix[:, 0], "invalid_word_vectors", ("ndarray",)),
        (lambda matrix: replaced(matrix, torch.nan), "word_vector_not_finite", ("row 3",)),
        (lambda matrix: replaced(matrix, 1e38), "word_vector_out_of_range", ("row 3", "1e+38")),
        (lambda matrix: replaced(matrix, -10001), "word_vector_out_of_range", ("row 3", -10001)),
        (lambda matrix: torch.zeros_like(matrix), "word_vector_zero", (21,)),
    ],
)
def test_load_glove_invalid_matrix_is_rejected(
    model: DRN, tmp_path: Path, change: Callable[[torch.Tensor], Any], code: str, values: tuple[object, ...]
) -> None:
    path, matrix = tmp_path / "glove_weights", torch.ones(model.query_encoder.embedding.weight.shape)
    # Words without a vector have rows of zeros in published matrices.
    matrix[5] = 0
    torch.save(matrix, path)
    load_glove(model, path, WORDS)
    torch.save(change(matrix), path)
    with raises(CheckpointError, code, path, *values):
        load_glove(model, path, WORDS)


@pytest.mark.parametrize(
    ("lines", "code", "values"),
    [
        ([line("w1", 1), line("w2", 1, width=5)], "word_vector_width_mismatch", ("line 2", 8)),
        ([line("nobody", 1)], "word_vectors_missing", (20,)),
        ([], "word_vectors_missing", (20,)),
        *(
            ([line("w3", 1), f"w1 {value} 1 1 1 1 1 1 1"], code, ("line 2", "'w1'", f"'{value}'"))
            for code, texts in {
                "word_vector_not_finite": ("one", "nan", "inf", "1e39"),
                "word_vector_out_of_range": ("1e38", "-1e38", "10001", "-2e4"),
            }.items()
            for value in texts
        ),
        *(
            ([line("w3", 1), line("w1", value)], "word_vector_zero", ("line 2", "'w1'", f"'{value}'"))
            for value in ("0", "0.0", "-0.0", "1e-60")
        ),
    ],
)
def test_load_glove_invalid_text_is_rejected(
    model: DRN, tmp_path: Path, lines: list[str], code: str, values: tuple[object, ...]
) -> None:
    before = model.state_dict()["query_encoder.embedding.weight"].clone()
    with raises(GroundingError, code, tmp_path / "glove.txt", *values):
        load_glove(model, write(tmp_path / "glove.txt", lines), WORDS)
    assert torch.equal(model.state_dict()["query_encoder.embedding.weight"], before)


def test_load_glove_missing_and_binary_files_are_rejected(model: DRN, tmp_path: Path) -> None:
    with raises(CheckpointError, "unreadable_file", tmp_path / "absent.txt"):
        load_glove(model, tmp_path / "absent.txt", WORDS)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x01" * 9)
    with raises(CheckpointError, "damaged_file", tmp_path / "binary"):
        load_glove(model, tmp_path / "binary", WORDS)


def test_authors_vectors_match_the_published_word_table(real_data: Path) -> None:
    words = json.loads((real_data / "charades_sta" / "Charades_word2id.json").read_text())
    model = fresh_model(DRNConfig(embed_dim=300, feature_dim=8, hidden_dim=8, fpn_dim=8), 0)
    assert load_glove(model, real_data / "charades_sta" / "glove_weights", words) == 1301
    vectors = model.query_encoder.embedding.weight.detach().numpy()
    length = np.linalg.norm(vectors, axis=1)

    def similarity(one: str, other: str) -> float:
        rows = [words[one], words[other]]
        return float(vectors[rows[0]] @ vectors[rows[1]] / length[rows].prod())

    # The rows belong to the words if similar words have similar vectors.
    assert similarity("door", "window") > similarity("door", "eating") + 0.1
