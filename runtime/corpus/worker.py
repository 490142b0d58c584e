"""A shard is grounded and becomes a file, whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Union

from runtime.artifacts.encoded_video import EncodedWindows
from runtime.core.errors import FeatureError, GroundingError, OutputError, QueryError, excerpt
from runtime.core.io.atomic_files import atomic_write, write_json
from runtime.core.io.digests import json_digest, sha256
from runtime.core.io.input_files import read_json
from runtime.core.names import by_fold, near_name
from runtime.core.repeat_filter import RepeatFilter, said_once
from runtime.core.sliding_windows import resolve_windows
from runtime.core.video import ClipTiming, Video
from runtime.corpus.feature_sources import FeatureSource, VideoRef, open_source
from runtime.corpus.queries import Question
from runtime.corpus.sharding import MANIFEST, Form, Settings, Shard, VideoQueries, shard_name
from runtime.grounding.grounder import Grounder
from runtime.grounding.requests import VideoInput
from runtime.grounding.warm_up import warm_usual

log = logging.getLogger("drn")

# A video, or a sentence that says why there is none.
Found = Union[VideoInput, str]

# Where processes note that they have begun a shard.
ATTEMPTS = ".attempts"
# Where the digests of shards are.
DIGESTS = ".digests"
# A shard that ended the process it was in so often is not begun again.
MAX_ATTEMPTS = 3
# Videos wait for each other until their questions fill so many batches, or they take so much memory.
BATCHES_TOGETHER = 8
MAX_WAITING_BYTES = 1 << 28
# Rows of a row group in Parquet.
ROWS_OF_GROUP = 4096
# Sentences of which a process remembers whether they can be asked.
KNOWN_SENTENCES = 1 << 16
# A process says the like of one warning so often: a corpus has a million sentences with an unknown word.
MAX_WARNINGS = 5


@dataclasses.dataclass(frozen=True)
class CorpusJob:
    """The values that every worker process receives once.

    Attributes:
        model, features, output: absolute paths.
        common: what is asked of every video.
        count: how many shards there are.
        settings: all else.
        manifest: digest of what the `corpus.json` says that the job wrote into `output`.
    """

    model: Path
    features: Path
    output: Path
    common: tuple[Question, ...]
    count: int
    settings: Settings
    manifest: str

    def path(self, shard: Shard) -> Path:
        """Return the file that a shard becomes."""
        return self.output / shard_name(shard.number, self.count, self.settings.form)


@dataclasses.dataclass(frozen=True)
class ShardResult:
    """The outcome of one shard.

    Attributes:
        number: which.
        pairs, errors: its rows, and those of them that say why they have no answer.
        attempts: how often it was begun, this time included.
        problem: a sentence that says why it was given up; None where its file is there.
    """

    number: int
    pairs: int
    errors: int = 0
    attempts: int = 1
    problem: str | None = None


def digest_path(job: CorpusJob, shard: Shard) -> Path:
    """Return the file that holds the digests of a shard and of the features that it was made of."""
    return job.output / DIGESTS / f"{shard.number:05d}.json"


def stamps_of(shard: Shard, stamp: Callable[[VideoRef], str]) -> dict[str, str]:
    """Return the stamp of the features of each video of a shard."""
    return {requested.video.name: stamp(requested.video) for requested in shard.asked if requested.known}


def is_finished(job: CorpusJob, shard: Shard, source: FeatureSource) -> bool:
    """Return whether a shard is there as it was written; a damaged one is removed, since it can be made again.

    Args:
        source: the features of the corpus.

    Raises:
        OutputError: the features of one of its videos have changed since, or it is not known of which it was made.
    """
    path, siblings = job.path(shard), digest_path(job, shard)
    if not path.is_file():
        return False
    if not siblings.is_file():
        raise OutputError(
            f"{path} has no digests in {siblings}, so it is not known which features it was made of. Remove the shard, "
            "or name another --output.",
            code="unknown_features",
        )
    try:
        record = read_json(siblings, "digests of a shard", OutputError)
        whole = record["digest"] == json_digest({**record, "digest": ""}) and record["sha256"] == sha256(path)
    except (OutputError, KeyError, TypeError):
        whole = False
    if not whole:
        log.warning("%s is damaged: it does not match its digest in %s; it is made again.", path, siblings)
        path.unlink()
        return False
    now = stamps_of(shard, source.stamp)
    shared = {requested.video.name: source.shared_file(requested.video) for requested in shard.asked if requested.known}
    before = record["features"]
    changed = [video for video in before if now.get(video) != before[video]]
    if changed:
        # Of a file of many videos it is not known which of them changed, apart from those that came or went.
        video = next((video for video in changed if not (before[video] and now.get(video))), "")
        file = None if video else shared.get(changed[0])
        subject = (
            f"The features of {excerpt(video or changed[0])}" if file is None else f"{file}, a file of many videos,"
        )
        remove = f"Remove {path.name}" if file is None else "Remove the shards of its videos"
        raise OutputError(
            f"{subject} changed since {path.name} was written. {remove} to ground them again, or name another "
            "--output.",
            code="features_changed",
        )
    return True


class Worker:
    """Grounds shards of one job, one after the other. The model is opened for the first of them."""

    def __init__(self, job: CorpusJob) -> None:
        self.job = job
        self._problem = functools.lru_cache(KNOWN_SENTENCES)(self._problem_of)
        self._repeats = RepeatFilter(MAX_WARNINGS, by_template=True)

    def __call__(self, shard: Shard) -> ShardResult:
        """Ground a shard, unless its file is there. What is wrong with it as a whole is returned, not raised."""
        path = self.job.path(shard)
        try:
            self._check_manifest()
            if path.is_file():
                return ShardResult(shard.number, len(shard))
            with _attempt(self._note(shard)) as attempts:
                if attempts > MAX_ATTEMPTS:
                    raise OutputError(
                        f"It was begun {attempts - 1} times, and each time the process ended before it was done "
                        f"(out of memory?), the last of them {_last_line(self._note(shard))}."
                    )
                with said_once(self._repeats):
                    errors = self._write(shard, path)
                return ShardResult(shard.number, len(shard), errors, attempts)
        except GroundingError as error:
            return ShardResult(shard.number, len(shard), problem=f"{path.name}: {error}")
        # The report names the shard and the error; the traceback is logged here.
        except Exception as error:
            log.exception("%s failed.", path.name)
            return ShardResult(shard.number, len(shard), problem=f"{path.name}: {type(error).__name__}: {error}.")

    @functools.cached_property
    def _grounder(self) -> Grounder:
        settings = self.job.settings
        grounder = Grounder.load(self.job.model, settings.device, settings.threads)
        grounder.windows = resolve_windows(grounder.windows, settings.window, settings.overlap)
        warm_usual(grounder, settings.batch_size)
        return grounder

    @functools.cached_property
    def _source(self) -> FeatureSource:
        return open_source(self.job.features)

    def _check_manifest(self) -> None:
        """Raise OutputError where the directory is not seen, or is another job's by now.

        A job that is killed may leave processes behind for a moment, which would put their shards there.
        """
        try:
            result = json_digest(json.loads((self.job.output / MANIFEST).read_bytes()))
        except (OSError, ValueError) as error:
            raise OutputError(
                f"{self.job.output} holds no {MANIFEST} here, on {platform.node()}; corpora are written to a file "
                "system that all machines see under the same path."
            ) from error
        if result != self.job.manifest:
            raise OutputError(f"{self.job.output} belongs to a job of other inputs by now; name another directory.")

    def _note(self, shard: Shard) -> Path:
        return self.job.output / ATTEMPTS / f"{shard.number:05d}"

    def _write(self, shard: Shard, path: Path) -> int:
        """Write the rows of a shard, and return how many of them are errors."""
        errors = 0
        # Before they are read: what changes meanwhile is noticed when the job is resumed.
        stamps = stamps_of(shard, self._source.stamp)
        with atomic_write(path) as temporary, open(temporary, "wb") as stream:
            with WRITERS[self.job.settings.form](stream) as write:
                for group in self._groups(shard):
                    for row in self._answered(group):
                        write(row)
                        errors += row["error"] is not None
            # Whole also if the machine stops now: a shard that is there is not made again.
            stream.flush()
            os.fsync(stream.fileno())
            self._check_manifest()
            # First, so that a shard that is there has its digests.
            record = {"sha256": sha256(temporary), "features": stamps, "digest": ""}
            write_json(digest_path(self.job, shard), {**record, "digest": json_digest(record)})
        return errors

    def _groups(self, shard: Shard) -> Iterator[list[tuple[VideoQueries, Found]]]:
        """Yield videos that are asked together. Who they are follows from the shard alone, and so do their batches."""
        result = self._source.load([requested.video for requested in shard.asked if requested.known], self._clock)
        group: list[tuple[VideoQueries, Found]] = []
        pairs, waiting = 0, 0
        for requested in shard.asked:
            if requested.known:
                subject = self._subject(next(result))
            else:
                subject = f"There is no video {excerpt(requested.video.name)} in {self.job.features}; check the name."
                subject += near_name(self._names, requested.video.name)
            group.append((requested, subject))
            pairs, waiting = pairs + len(requested), waiting + _bytes(subject)
            if pairs >= BATCHES_TOGETHER * self.job.settings.batch_size or waiting >= MAX_WAITING_BYTES:
                yield group
                group, pairs, waiting = [], 0, 0
        if group:
            yield group

    @functools.cached_property
    def _names(self) -> dict[str, str]:
        """Names of the videos of the corpus, for `near_name`."""
        return by_fold(video.name for video in self._source.listing())

    @property
    def _clock(self) -> ClipTiming:
        return self._grounder.manifest.features.clock

    def _subject(self, found: Video | str) -> Found:
        """Return a video as it is best asked: encoded, if the model is split."""
        grounder = self._grounder
        if isinstance(found, str):
            return found
        try:
            if not grounder.is_pair:
                grounder.check_fits(found)
                return found
            return grounder.encode(found)
        except FeatureError as error:
            return str(error)

    def _answered(self, group: list[tuple[VideoQueries, Found]]) -> list[dict[str, Any]]:
        """Return a row for each question of a group, in order."""
        rows, waiting, pairs = [], [], []
        for requested, subject in group:
            for question in requested.questions(self.job.common):
                problem = subject if isinstance(subject, str) else self._problem(question.query)
                row: dict[str, Any] = {
                    "qid": question.qid,
                    "query": question.query,
                    "vid": requested.video.name,
                    "pred_relevant_windows": [],
                    "error": problem,
                }
                rows.append(row)
                if not isinstance(subject, str) and problem is None:
                    waiting.append(row)
                    pairs.append((subject, question.query))
        if pairs:
            settings = self.job.settings
            result = self._grounder.ground_batch(pairs, settings.top_k, settings.batch_size)
            for row, moments in zip(waiting, result):
                row["pred_relevant_windows"] = [[moment.start, moment.end, moment.score] for moment in moments]
        return rows

    def _problem_of(self, query: str) -> str | None:
        """Return why a sentence cannot be asked, or None."""
        try:
            self._grounder.encode_query(query)
        except QueryError as error:
            return str(error)
        return None


def _bytes(subject: Found) -> int:
    """Return the memory that a video takes while it waits."""
    if isinstance(subject, str):
        return 0
    parts = subject.parts if isinstance(subject, EncodedWindows) else (subject,)
    return sum(part.features.nbytes for part in parts)


@contextlib.contextmanager
def _attempt(note: Path) -> Iterator[int]:
    """Note that a shard is begun, and yield how often it was. The note stays only if the process ends within."""
    try:
        note.parent.mkdir(exist_ok=True)
        with open(note, "a+", encoding="utf-8") as stream:
            stream.write(f"process {os.getpid()} on {platform.node()}\n")
            stream.seek(0)
            attempts = len(stream.readlines())
    except OSError as error:
        raise OutputError(f"{note} cannot be written: {error.strerror or error}.") from error
    try:
        yield attempts
    finally:
        with contextlib.suppress(OSError):
            note.unlink()


def _last_line(note: Path) -> str:
    # The line before is the last that ended.
    return note.read_text(encoding="utf-8").splitlines()[-2]


Write = Callable[[dict[str, Any]], None]


@contextlib.contextmanager
def _jsonl(stream: BinaryIO) -> Iterator[Write]:
    def write(row: dict[str, Any]) -> None:
        stream.write(json.dumps(row, allow_nan=False).encode() + b"\n")

    yield write


@contextlib.contextmanager
def _parquet(stream: BinaryIO) -> Iterator[Write]:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    writer: Any = None
    rows: list[dict[str, Any]] = []

    def flush() -> None:
        nonlocal writer
        schema = pa.schema(
            {
                # All qids of a corpus are of one kind.
                "qid": pa.string() if isinstance(rows[0]["qid"], str) else pa.int64(),
                "query": pa.string(),
                "vid": pa.string(),
                "pred_relevant_windows": pa.list_(pa.list_(pa.float64())),
                "error": pa.string(),
            }
        )
        if writer is None:
            writer = parquet.ParquetWriter(stream, schema)
        writer.write_table(pa.Table.from_pylist(rows, schema))
        rows.clear()

    def write(row: dict[str, Any]) -> None:
        rows.append(row)
        if len(rows) == ROWS_OF_GROUP:
            flush()

    yield write
    if rows:
        flush()
    writer.close()


WRITERS: dict[Form, Callable[[BinaryIO], contextlib.AbstractContextManager[Write]]] = {
    "jsonl": _jsonl,
    "parquet": _parquet,
}
