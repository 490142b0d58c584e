"""Every pair is in exactly one shard, and the shards are deterministic."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from runtime.core.errors import OutputError
from runtime.core.io.atomic_files import LOCK
from runtime.corpus.feature_sources import VideoRef
from runtime.corpus.queries import Question
from runtime.corpus.sharding import MANIFEST, check_same, plan, require_corpus_dir, shard_name
from tests.raising import raises

VIDEOS = ("a", "b", "c", "d")


@given(
    listed=st.lists(st.sampled_from(VIDEOS), unique=True),
    about=st.lists(st.sampled_from((None, *VIDEOS))),
    size=st.integers(1, 7),
)
def test_shards_contain_each_pair_once_within_size(listed: list[str], about: list[str | None], size: int) -> None:
    questions = [Question(line, line, f"sentence {line}", video) for line, video in enumerate(about, 1)]
    common, shards = plan([VideoRef(name) for name in listed], questions, size)
    actual = [
        (shard_video.video.name, question.line)
        for shard in shards
        for shard_video in shard.videos
        for question in shard_video.questions(common)
    ]
    expected = [(name, q.line) for q in questions for name in ([q.video] if q.video else listed)]
    assert Counter(actual) == Counter(expected)
    assert all(0 < len(shard) <= size for shard in shards)
    assert [shard.number for shard in shards] == list(range(1, len(shards) + 1))
    # Queries of a video are in the order of the file, and a video that fits into a shard is in one only.
    for name in dict.fromkeys(name for name, _ in actual):
        lines = [line for video, line in actual if video == name]
        assert lines == sorted(lines)
        holding = [shard for shard in shards if name in {shard_video.video.name for shard_video in shard.videos}]
        assert len(holding) == 1 or len(lines) > size
    # Known videos come first, in the order of the listing.
    order = list(dict.fromkeys(name for name, _ in actual))
    assert [name for name in order if name in listed] == order[: len(set(order) & set(listed))]
    assert plan([VideoRef(name) for name in listed], questions, size) == (common, shards)


def test_shard_name_contains_number_and_count() -> None:
    assert shard_name(17, 240, "parquet") == "shard-00017-of-00240.parquet"


def identity(**changes: object) -> dict[str, object]:
    return {"format": "drn-corpus/1", "model": {"sha256": "1"}, "settings": {"top_k": 5, "threads": 1}, **changes}


def test_directory_of_other_inputs_is_rejected_naming_them(tmp_path: Path) -> None:
    (tmp_path / LOCK).touch()
    check_same(tmp_path, identity())
    (tmp_path / MANIFEST).write_text(json.dumps(identity()))
    # Without a complete shard nothing can be lost.
    check_same(tmp_path, identity(model={"sha256": "2"}))
    (tmp_path / shard_name(1, 2, "jsonl")).touch()
    check_same(tmp_path, identity())
    with raises(OutputError, "settings_mismatch", tmp_path, "model sha256", "'1'", "'2'", "settings top_k", 5, 3):
        check_same(tmp_path, identity(model={"sha256": "2"}, settings={"top_k": 3, "threads": 1}))


def test_directory_with_foreign_content_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").touch()
    with raises(OutputError, "output_not_empty", tmp_path, MANIFEST):
        require_corpus_dir(tmp_path)
    with raises(OutputError, "output_is_file", tmp_path / "photo.jpg"):
        require_corpus_dir(tmp_path / "photo.jpg")
    # A lock of another program does not make a directory a corpus.
    (tmp_path / LOCK).touch()
    require_corpus_dir(tmp_path)
    with raises(OutputError, "output_not_empty", tmp_path, MANIFEST):
        check_same(tmp_path, identity())
    for text in ("[]", '{"format": "drn-corpus/0"}'):
        (tmp_path / MANIFEST).write_text(text)
        with raises(OutputError, "unknown_format", tmp_path / MANIFEST, "'drn-corpus/1'"):
            check_same(tmp_path, identity())
    (tmp_path / MANIFEST).write_text("{")
    with raises(OutputError, "invalid_json", tmp_path / MANIFEST):
        check_same(tmp_path, identity())
    require_corpus_dir(tmp_path / "new")
