"""Ground a corpus in this process: it is resumed, rejected, and complete after any interruption."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from runtime.core.errors import GroundingError, OutputError
from runtime.corpus import job
from runtime.corpus.sharding import MANIFEST
from runtime.corpus.worker import Worker
from tests.raising import quotes, raises, records
from tests.runtime.corpus.conftest import Corpus, Here, content, write_rows

ROWS = [{"query": "a person opens the door."}, {"query": "xyzzy"}]


def test_resumed_job_has_same_shards(
    here: Here, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, queries = corpus(ROWS)
    complete = here(features, queries, tmp_path / "whole", shard_pairs=3)
    output, calls, call = tmp_path / "corpus", [], Worker.__call__

    def interrupted(self: Worker, shard: Any) -> Any:
        calls.append(shard.number)
        if len(calls) == 3:
            # The files of a process that was killed within a shard.
            left = output / ".drn-01234567-abcdefgh-shard-00003-of-00006.jsonl"
            left.write_text('{"qid": 1, "que')
            os.utime(left, (0, 0))
            raise KeyboardInterrupt
        return call(self, shard)

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            here(features, queries, shard_pairs=3)
    assert len(content(output)) == 2
    before = {path.name: path.stat().st_mtime_ns for path in output.glob("shard-*")}
    result = here(features, queries, shard_pairs=3)
    assert content(output) == content(complete.output)
    assert (result.grounded, result.pairs, complete.grounded) == (8, 12, 12)
    assert all((output / name).stat().st_mtime_ns == time for name, time in before.items())
    assert quotes(str(result), 4)
    assert here(features, queries, shard_pairs=3).grounded == 0
    assert {path.name: path.stat().st_mtime_ns for path in output.glob("shard-*")}.items() >= before.items()


def test_changed_inputs_are_rejected_by_name(here: Here, corpus: Corpus, tiny_model: Path, tmp_path: Path) -> None:
    features, queries = corpus(ROWS)
    model = tmp_path / "tiny.onnx"
    model.write_bytes(tiny_model.read_bytes())
    output = here(features, queries, model=model).output
    complete = content(output)
    with raises(OutputError, "settings_mismatch", "settings top_k", 5, 4):
        here(features, queries, model=model, top_k=4)
    table = features / "Charades_duration.json"
    longer = json.dumps({**json.loads(table.read_text()), "AAAA1": 31.0})
    for path, change, values in (
        (queries, json.dumps(ROWS[0]) + "\n", ["queries rows", 2, 1, "queries sha256"]),
        (table, longer, ["features digest"]),
        (model, tiny_model.read_bytes() + b"\0", ["model sha256"]),
    ):
        before = path.read_bytes()
        path.write_bytes(change.encode() if isinstance(change, str) else change)
        with raises(OutputError, "settings_mismatch", *values):
            here(features, queries, model=model)
        path.write_bytes(before)
    assert content(output) == complete


def test_job_finished_before_lock_is_not_overwritten(
    here: Here, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, queries = corpus(ROWS)
    other = write_rows(tmp_path / "other.jsonl", ROWS[:1])
    lock = job.locked

    def after_another(output: Path) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(job, "locked", lock)
            here(features, other, shard_pairs=3)
        return lock(output)

    monkeypatch.setattr(job, "locked", after_another)
    with raises(OutputError, "settings_mismatch", "queries rows", 1, 2):
        here(features, queries, shard_pairs=3)
    output = tmp_path / "corpus"
    assert json.loads((output / MANIFEST).read_text())["queries"]["file"] == "other.jsonl"
    assert sorted(content(output)) == ["shard-00001-of-00002.jsonl", "shard-00002-of-00002.jsonl"]


def test_simultaneous_job_fails_with_output_locked(
    here: Here, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, queries = corpus(ROWS)
    write, refused = job.write_json, []

    def meanwhile(path: Path, value: Any) -> None:
        # The first job has its lock but no manifest yet, and its directory is not empty.
        (path.parent / f".{MANIFEST}.x").touch()
        with monkeypatch.context() as patch:
            patch.setattr(job, "write_json", lambda *_: pytest.fail("both write"))
            with raises(OutputError, "output_locked") as caught:
                here(features, queries)
        refused.append(caught)
        (path.parent / f".{MANIFEST}.x").unlink()
        write(path, value)

    monkeypatch.setattr(job, "write_json", meanwhile)
    here(features, queries)
    assert len(refused) == 1


def test_missing_inputs_are_rejected_before_writing(here: Here, mini: Path, tmp_path: Path) -> None:
    with raises(GroundingError, "missing_file", tmp_path / "none.jsonl"):
        here(mini, tmp_path / "none.jsonl")
    with raises(GroundingError, "missing_file", tmp_path / "none"):
        here(tmp_path / "none", write_rows(tmp_path / "queries.jsonl", ROWS))
    with raises(GroundingError, "unknown_feature_store", tmp_path / "queries.jsonl"):
        here(tmp_path / "queries.jsonl", tmp_path / "queries.jsonl")
    with raises(GroundingError, "missing_file", tmp_path / "none.onnx"):
        here(mini, write_rows(tmp_path / "queries.jsonl", ROWS), model=tmp_path / "none.onnx")
    assert not (tmp_path / "corpus").exists()


def test_corpus_logs_common_queries_and_missing_answers(
    here: Here, corpus: Corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "drn")
    here(*corpus(ROWS))
    assert records(caplog, logging.INFO, 2, "vid")
    assert not records(caplog, logging.WARNING, code="no_answers")
    caplog.clear()
    here(*corpus([{"query": "xyzzy", "vid": "AAAA1"}]), tmp_path / "other")
    assert not records(caplog, logging.INFO, "vid")
    assert records(caplog, logging.WARNING, code="no_answers")


def test_progress_is_logged_without_a_progress_bar(
    here: Here, corpus: Corpus, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.corpus.job.SECONDS_BETWEEN_LINES", 0)
    caplog.set_level("INFO", "drn")
    features, queries = corpus(ROWS)
    here(features, queries, shard_pairs=4)
    lines = records(caplog, logging.INFO, 12, "remaining")
    assert len(lines) == 3
    assert quotes(lines[0].getMessage(), 4, 12)
    assert quotes(lines[-1].getMessage(), 12, 6, "00:00")
