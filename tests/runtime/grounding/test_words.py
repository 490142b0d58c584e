"""Test `python -m runtime.grounding.words`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime.core.tokenizer import Vocabulary
from runtime.grounding.words import words
from tests.raising import check_error, quotes


@pytest.fixture(scope="module")
def model(write_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    table = {"person": 1, "opens": 2, "Open": 3, "the": 4, "door": 5}
    return write_model(tmp_path_factory.mktemp("words") / "words.onnx", vocabulary=Vocabulary(table))


def test_words_without_prefix_lists_all_sorted(model: Path, run_command: Any) -> None:
    outcome = run_command(words, model)
    assert outcome.out.split() == ["Open", "door", "opens", "person", "the", "5", "words."]


def test_words_with_prefix_ignores_case_and_counts(model: Path, run_command: Any) -> None:
    listed, *rest = run_command(words, model, "oP").out.splitlines()
    assert listed.split() == ["Open", "opens"]
    assert quotes(" ".join(rest), 2, 5, "oP")


def test_words_without_match_shows_similar_words(model: Path, run_command: Any) -> None:
    for arguments in ([model, "doar"], ["doar", "--model", model]):
        outcome = run_command(words, *arguments)
        assert quotes(outcome.out, 0, "doar", "door")


def test_words_as_json(model: Path, run_command: Any) -> None:
    shown = json.loads(run_command(words, model, "op", "--json").out)
    assert shown == {"model": "words.onnx", "prefix": "op", "count": 2, "words": ["Open", "opens"], "similar": []}
    shown = json.loads(run_command(words, model, "openz", "--json").out)
    assert (shown["count"], shown["words"], shown["similar"]) == (0, [], ["opens", "Open"])


def test_words_rejects_models_without_table(tmp_path: Path, write_model: Callable[..., Path], refused: Any) -> None:
    empty = write_model(tmp_path / "empty.onnx", vocabulary=Vocabulary({}))
    check_error(refused(words, empty), "missing_word_table")
    (tmp_path / "words.txt").touch()
    check_error(refused(words, tmp_path / "words.txt"), "wrong_suffix", tmp_path / "words.txt")
    check_error(refused(words, "triton://host:8001/drn"), "wrong_model_kind")
