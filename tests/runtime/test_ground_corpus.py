"""Test `python -m runtime.ground_corpus` without Ray; `corpus/test_ray_runner.py` tests it with Ray."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from runtime.ground_corpus import ground_corpus
from tests.raising import check_error


@pytest.fixture
def words(tiny_model: Path, mini: Path, tmp_path: Path) -> list[object]:
    queries = tmp_path / "queries.jsonl"
    queries.write_text('{"query": "a person opens the door."}\n')
    output = tmp_path / "corpus"
    return ["--model", tiny_model, "--features", mini, "--queries", queries, "--output", output]


def test_ground_corpus_writes_shards_and_prints_pair_count(
    run_command: Any, words: list[object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outcome = run_command(ground_corpus, *words, "--actors", 0, "--shard-pairs", 4)
    assert outcome.out.startswith(f"6 pairs in 2 shards in {tmp_path / 'corpus'}: 6 grounded in ")
    assert "Next:  python -m runtime.describe" in caplog.text
    about = json.loads((tmp_path / "corpus" / "corpus.json").read_text())
    assert (about["format"], about["pairs"], about["shards"]) == ("drn-corpus/1", 6, 2)


@pytest.mark.parametrize(
    ("option", "value"), [("--actors", -1), ("--threads", 0), ("--shard-pairs", 0), ("--top-k", 0), ("--batch-size", 0)]
)
def test_invalid_option_is_named(refused: Any, words: list[object], option: str, value: int) -> None:
    check_error(refused(ground_corpus, *words, option, value), "invalid_option", option, value)


def test_missing_ray_error_names_the_extra(refused: Any, words: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    error = refused(ground_corpus, *words)
    check_error(error, "missing_library", "pip install '.[corpus]'", "--actors 0")
