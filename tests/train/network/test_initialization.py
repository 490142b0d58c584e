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
def test_fresh_network_has_low_matching_scores(made_up_inputs: Any) -> None:
    scores = fresh_model(WIDE, 0).eval()(*made_up_inputs(WIDE, [4, 2])).matching_logits.sigmoid()
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


def line(word: str, value: float, width: int = 8) -> str:
    return " ".join([word, *[str(value)] * width])


def test_load_glove_text_sets_vectors_of_known_words(
    model: DRN, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = model.query_encoder.embedding.weight.detach().clone()
    path = write(tmp_path / "glove.txt", [line("w3", 0.5), line("elsewhere", 1), line(". . .", 2), line("w20", -1)])
    with caplog.at_level(logging.INFO, "drn"):
        assert load_glove(model, path, WORDS) == 2
    table = model.query_encoder.embedding.weight
    assert torch.equal(table[3], torch.full((8,), 0.5))
    assert torch.equal(table[20], torch.full((8,), -1.0))
    others = [row for row in range(21) if row not in (3, 20)]
    assert torch.equal(table[others], before[others])
    assert records(caplog, logging.INFO, 2, 20)
    assert table.requires_grad


def test_load_glove_repeated_word_uses_first_vector(
    model: DRN, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
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
    ("shape", "code", "values"),
    [
        ((20, 8), "word_vector_shape_mismatch", ((20, 8), (21, 8))),
        ((21, 9), "word_vector_shape_mismatch", ((21, 9), (21, 8))),
        ((21,), "invalid_word_vectors", ("ndarray",)),
    ],
)
def test_load_glove_matrix_of_another_size_is_rejected(
    model: DRN, tmp_path: Path, shape: tuple[int, ...], code: str, values: tuple[object, ...]
) -> None:
    torch.save(torch.zeros(shape), tmp_path / "glove_weights")
    with raises(CheckpointError, code, tmp_path / "glove_weights", *values):
        load_glove(model, tmp_path / "glove_weights", WORDS)


@pytest.mark.parametrize("value", ["nan", "inf", "1e39"])
def test_load_glove_value_not_finite_is_rejected(model: DRN, tmp_path: Path, value: str) -> None:
    path = write(tmp_path / "glove.txt", [line("w3", 1), line("w1", 1).replace("1 1", f"1 {value}", 1)])
    with raises(CheckpointError, "word_vector_not_finite", path, "line 2", "'w1'", f"'{value}'"):
        load_glove(model, path, WORDS)


@pytest.mark.parametrize("value", ["1e38", "-1e38", "10001", "-2e4"])
def test_load_glove_value_out_of_range_is_rejected(model: DRN, tmp_path: Path, value: str) -> None:
    path = write(tmp_path / "glove.txt", [line("w3", 1), line("w1", 1).replace("1 1", f"1 {value}", 1)])
    with raises(CheckpointError, "word_vector_out_of_range", path, "line 2", "'w1'", f"'{value}'"):
        load_glove(model, path, WORDS)
    # Words that no query has may hold anything.
    write(tmp_path / "glove.txt", [line("w3", 1e4), line("elsewhere", 1e38), line("other", 0)])
    assert load_glove(model, tmp_path / "glove.txt", WORDS) == 1


@pytest.mark.parametrize("value", ["0", "0.0", "-0.0", "1e-60"])
def test_load_glove_vector_of_zeros_is_rejected(model: DRN, tmp_path: Path, value: str) -> None:
    path = write(tmp_path / "glove.txt", [line("w3", 1), " ".join(["w1", *[value] * 8])])
    with raises(CheckpointError, "word_vector_zero", path, "line 2", "'w1'", f"'{value}'"):
        load_glove(model, path, WORDS)


@pytest.mark.parametrize(
    ("change", "code", "values"),
    [
        (lambda matrix: matrix.__setitem__((3, 1), 1e38), "word_vector_out_of_range", ("row 3", "1e+38")),
        (lambda matrix: matrix.__setitem__((3, 1), -10001), "word_vector_out_of_range", ("row 3", -10001)),
        (lambda matrix: matrix.zero_(), "word_vector_zero", (21,)),
    ],
)
def test_load_glove_matrix_out_of_range_is_rejected(
    model: DRN, tmp_path: Path, change: Callable[[torch.Tensor], Any], code: str, values: tuple[object, ...]
) -> None:
    matrix = torch.ones(model.query_encoder.embedding.weight.shape)
    # Words without a vector have rows of zeros in published matrices.
    matrix[5] = 0
    torch.save(matrix, tmp_path / "glove_weights")
    load_glove(model, tmp_path / "glove_weights", WORDS)
    change(matrix)
    torch.save(matrix, tmp_path / "glove_weights")
    with raises(CheckpointError, code, tmp_path / "glove_weights", *values):
        load_glove(model, tmp_path / "glove_weights", WORDS)


def test_load_glove_matrix_not_finite_is_rejected(model: DRN, tmp_path: Path) -> None:
    matrix = torch.zeros(model.query_encoder.embedding.weight.shape)
    matrix[3, 0] = torch.nan
    torch.save(matrix, tmp_path / "glove_weights")
    with raises(CheckpointError, "word_vector_not_finite", tmp_path / "glove_weights", "row 3"):
        load_glove(model, tmp_path / "glove_weights", WORDS)


@pytest.mark.parametrize(
    ("lines", "code", "values"),
    [
        ([line("w1", 1), line("w2", 1, width=5)], "word_vector_width_mismatch", ("line 2", 8)),
        ([line("w1", 1).replace("1 1", "1 one")], "word_vector_not_finite", ("line 1", "'one'")),
        ([line("nobody", 1)], "word_vectors_missing", (20,)),
        ([], "word_vectors_missing", (20,)),
    ],
)
def test_load_glove_malformed_text_is_rejected(
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

    def likeness(one: str, other: str) -> float:
        rows = [words[one], words[other]]
        return float(vectors[rows[0]] @ vectors[rows[1]] / length[rows].prod())

    # The rows are those of the words: like words are close.
    assert likeness("door", "window") > likeness("door", "eating") + 0.1
