"""Ground a shard in this process: the rows of its pairs, and errors that do not stop it."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.core.errors import GroundingError
from runtime.corpus.sharding import MANIFEST
from runtime.corpus.worker import MAX_ATTEMPTS, Worker
from runtime.datasets.dataset import DataSet
from runtime.grounding.grounder import Grounder
from tests.raising import quotes, raises, records
from tests.runtime.corpus.conftest import Corpus, Here, content, read_rows, write_rows

DOOR, DOG, UNKNOWN = "a person opens the door.", "dog sits.", "xyzzy"


def test_corpus_rows_equal_grounder_predictions(here: Here, corpus: Corpus, tiny_model: Path) -> None:
    features, queries = corpus([{"query": DOOR}, {"query": DOG, "vid": "CCCC3", "qid": "dog"}])
    result = here(features, queries, shard_pairs=3, top_k=2)
    rows = read_rows(result.output)
    data_set, grounder = DataSet(features), Grounder.load(tiny_model, "cpu", 1)
    expected_rows = [(1, DOOR, name) for name in sorted(data_set.durations)]
    expected_rows.insert(3, ("dog", DOG, "CCCC3"))
    assert [(row["qid"], row["query"], row["vid"]) for row in rows] == expected_rows
    assert (result.pairs, result.grounded, result.errors, result.shards) == (7, 7, 0, 3)
    for row in rows:
        expected = grounder.ground(data_set.video(row["vid"]), row["query"], 2)
        actual = np.array(row["pred_relevant_windows"])
        np.testing.assert_allclose(actual, [[m.start, m.end, m.score] for m in expected], rtol=1e-5)
        assert row["error"] is None


def test_invalid_video_or_sentence_becomes_error_row(here: Here, damaged: Path, tmp_path: Path) -> None:
    rows = [{"query": DOOR}, {"query": UNKNOWN}, {"query": ""}, {"query": DOG, "vid": "ZZZZ9"}]
    result = here(damaged, write_rows(tmp_path / "queries.jsonl", rows))
    actual = {(row["vid"], row["query"]): row for row in read_rows(result.output)}
    assert len(actual) == result.pairs == 6 * 3 + 1
    values = {
        ("BBBB2", DOOR): ["'BBBB2'"],
        ("CCCC3", DOOR): ["CCCC3.pt"],
        ("DDDD4", DOOR): ["DDDD4", 8, 16],
        ("AAAA1", UNKNOWN): [repr(UNKNOWN)],
        ("AAAA1", ""): ["''"],
        ("ZZZZ9", DOG): ["'ZZZZ9'"],
    }
    for key, quoted in values.items():
        assert quotes(actual[key]["error"], *quoted)
        assert actual[key]["pred_relevant_windows"] == []
    complete = {key for key, row in actual.items() if row["error"] is None}
    assert complete == {(name, DOOR) for name in ("AAAA1", "EEEE5", "FFFF6")}
    assert result.errors == len(actual) - len(complete)


@pytest.mark.parametrize("split", [False, True], ids=["whole model", "split model"])
def test_contradictory_video_is_error(
    here: Here, pair_files: Path, tiny_model: Path, tmp_path: Path, split: bool
) -> None:
    features = tmp_path / "features"
    features.mkdir()
    durations = {
        "fits": {"duration": 9.0, "num_frames": 248},
        "four_times": {"duration": 3.0, "num_frames": 70},
        "quarter": {"duration": 36.0, "num_frames": 980},
        "milliseconds": 9000.0,
        "constant": 9.0,
    }
    (features / "durations.json").write_text(json.dumps(durations))
    for name in durations:
        np.save(features / f"{name}.npy", np.random.default_rng(0).random((30, 16), np.float32) ** (name != "constant"))
    queries = write_rows(tmp_path / "queries.jsonl", [{"query": DOOR}, {"query": "the dirigible"}])
    result = here(features, queries, model=pair_files if split else tiny_model)
    errors = {(row["vid"], row["query"]): row["error"] for row in read_rows(result.output)}
    assert errors["fits", DOOR] is None
    assert quotes(errors["fits", "the dirigible"], "'dirigible'")
    assert quotes(errors["four_times", DOOR], "durations.json", 70)
    assert quotes(errors["quarter", DOOR], "durations.json", 980)
    assert quotes(errors["milliseconds", DOOR], "milliseconds", 9000)
    assert quotes(errors["constant", DOOR], "constant", 1, 30)


def test_each_video_is_read_and_encoded_once(
    here: Here, corpus: Corpus, pair_files: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[tuple[str, str]] = Counter()
    video, encode = DataSet.video, Grounder.encode_segments

    def counted(self: DataSet, name: str) -> Any:
        calls["read", name] += 1
        return video(self, name)

    def counted_encoding(self: Grounder, segments: Any, duration: float, name: str, offset: float) -> Any:
        calls["encoded", name] += 1
        return encode(self, segments, duration, name, offset)

    monkeypatch.setattr(DataSet, "video", counted)
    monkeypatch.setattr(Grounder, "encode_segments", counted_encoding)
    # Queries of one video are not adjacent in the file, and exceed a batch.
    features, queries = corpus([{"query": DOOR + " door" * n, "vid": v} for n in range(7) for v in ("AAAA1", "BBBB2")])
    for name, model in (("whole", tiny_model), ("split", pair_files)):
        assert here(features, queries, tmp_path / name, model=model, batch_size=3).errors == 0
    assert calls == {("read", "AAAA1"): 2, ("read", "BBBB2"): 2, ("encoded", "AAAA1"): 1, ("encoded", "BBBB2"): 1}
    assert content(tmp_path / "whole") == content(tmp_path / "split")


def test_long_videos_are_grounded_in_windows(here: Here, corpus: Corpus, tiny_model: Path, tmp_path: Path) -> None:
    features, queries = corpus([{"query": DOOR, "vid": "DDDD4"}])
    result = here(features, queries, window=20.0)
    (row,) = read_rows(result.output)
    grounder = Grounder.load(tiny_model, "cpu", 1)
    complete = grounder.ground(DataSet(features).video("DDDD4"), DOOR)
    assert row["pred_relevant_windows"]
    assert row["pred_relevant_windows"] != [[moment.start, moment.end, moment.score] for moment in complete]


def test_parquet_rows_equal_jsonl_rows(here: Here, damaged: Path, tmp_path: Path, monkeypatch: Any) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="Parquet needs the extra [corpus]")
    monkeypatch.setattr("runtime.corpus.worker.PARQUET_GROUP_ROWS", 4)
    queries = write_rows(tmp_path / "queries.jsonl", [{"query": DOOR}, {"query": UNKNOWN}])
    lines = here(damaged, queries, tmp_path / "lines", shard_pairs=6)
    table = here(damaged, queries, tmp_path / "table", shard_pairs=6, form="parquet")
    again = here(damaged, queries, tmp_path / "again", shard_pairs=6, form="parquet")
    shards = sorted(table.output.glob("shard-*"))
    assert [row for path in shards for row in parquet.read_table(path).to_pylist()] == read_rows(lines.output)
    assert parquet.ParquetFile(shards[0]).num_row_groups == 2
    assert content(table.output) == content(again.output)
    named = write_rows(tmp_path / "named.jsonl", [{"query": DOOR, "qid": "a"}])
    here(damaged, named, tmp_path / "named", form="parquet")
    assert parquet.read_table(next((tmp_path / "named").glob("shard-*")))["qid"].to_pylist() == ["a"] * 6


def test_rows_ignore_batch_size(here: Here, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features, queries = corpus([{"query": DOOR}, {"query": DOG}])
    here(features, queries, tmp_path / "together")
    monkeypatch.setattr("runtime.corpus.worker.MAX_WAITING_BYTES", 1)
    here(features, queries, tmp_path / "alone")
    together, alone = read_rows(tmp_path / "together"), read_rows(tmp_path / "alone")
    for row, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(row.pop("pred_relevant_windows"), other.pop("pred_relevant_windows"), rtol=1e-5)
        assert row == other


def test_similar_warnings_are_logged_up_to_limit(
    here: Here, corpus: Corpus, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.corpus.worker.MAX_WARNINGS", 2)
    features, queries = corpus([{"query": f"{DOOR} xyzzy{n}", "vid": "AAAA1"} for n in range(9)])
    here(features, queries)
    assert len(records(caplog, logging.WARNING, "xyzzy0")) == len(records(caplog, logging.WARNING, "xyzzy1")) == 1
    assert not any(f"xyzzy{number}" in caplog.text for number in range(2, 9))


@pytest.mark.parametrize("kind", [GroundingError("the disk is gone"), RuntimeError("a fault")])
def test_invalid_shard_ends_the_job_and_is_named(
    here: Here, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Exception
) -> None:
    features, queries = corpus([{"query": DOOR}])
    ground_batch = Grounder.ground_batch

    def failing(self: Grounder, pairs: Any, *options: Any) -> Any:
        if any(video.name == "CCCC3" for video, _ in pairs):
            raise kind
        return ground_batch(self, pairs, *options)

    monkeypatch.setattr(Grounder, "ground_batch", failing)
    with raises(GroundingError, "shard_failed", "shard-00002-of-00003.jsonl", str(kind)):
        here(features, queries, shard_pairs=2)
    assert list(content(tmp_path / "corpus")) == ["shard-00001-of-00003.jsonl"]


def test_repeatedly_crashing_shard_is_abandoned(here: Here, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    features, queries = corpus([{"query": DOOR}])

    def leave_notes(output: Path) -> None:
        # Killed processes leave such files, and a new job deletes them first.
        (output / ".attempts").mkdir(exist_ok=True)
        (output / ".attempts" / "00001").write_text("process 7 on node\n" * MAX_ATTEMPTS)

    monkeypatch.setattr("runtime.corpus.job._clean", leave_notes)
    with raises(GroundingError, "shard_failed", "shard-00001-of-00001.jsonl", 3, "process 7 on node"):
        here(features, queries)


def test_output_directory_missing_on_worker_is_named(
    here: Here, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, queries = corpus([{"query": DOOR}])
    monkeypatch.setattr("runtime.corpus.job.write_json", lambda *_: None)
    with raises(GroundingError, "shard_failed", "shard-00001-of-00001.jsonl", tmp_path / "corpus", "corpus.json"):
        here(features, queries)
    assert not (tmp_path / "corpus").exists()


def test_orphaned_worker_writes_no_shard_of_another_job(
    here: Here, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, queries = corpus([{"query": DOOR}])
    answered = Worker._rows

    def and_meanwhile(self: Worker, group: Any) -> Any:
        rows = answered(self, group)
        # The job was killed, and a job with other inputs has started.
        (tmp_path / "corpus" / MANIFEST).write_text('{"format": "another"}')
        return rows

    monkeypatch.setattr(Worker, "_rows", and_meanwhile)
    with raises(GroundingError, "shard_failed", "shard-00001-of-00001.jsonl", tmp_path / "corpus"):
        here(features, queries)
    assert not list((tmp_path / "corpus").glob("shard-*"))
