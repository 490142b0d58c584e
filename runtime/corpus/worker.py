"""Ground the shards of a corpus, and write each to a file completely or not at all."""

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
from runtime.core.repeat_filter import RepeatFilter, logged_once
from runtime.core.sliding_windows import resolve_windows
from runtime.core.video import Video
from runtime.corpus.feature_sources import FeatureSource, VideoRef, open_source
from runtime.corpus.queries import Question
from runtime.corpus.sharding import MANIFEST, Form, Settings, Shard, VideoQueries, shard_name
from runtime.grounding.grounder import Grounder
from runtime.grounding.requests import VideoInput
from runtime.grounding.warm_up import warm_usual

log = logging.getLogger("drn")

# A video for the model, or the reason why it cannot be grounded.
VideoOrError = Union[VideoInput, str]

# Directory of files that count the attempts of a shard.
ATTEMPTS = ".attempts"
# Directory of the digests of shards.
DIGESTS = ".digests"
# Maximum number of attempts of a shard that ends its process.
MAX_ATTEMPTS = 3
# Videos are grouped until their queries fill so many batches, or they take so much memory.
BATCHES_PER_GROUP = 8
MAX_WAITING_BYTES = 1 << 28
PARQUET_GROUP_ROWS = 4096
# Queries whose validity a process caches.
CACHED_QUERIES = 1 << 16
# Maximum repetitions of a warning per process: a corpus may have a million queries with an unknown word.
MAX_WARNINGS = 5


@dataclasses.dataclass(frozen=True)
class CorpusJob:
    """The values that every worker process receives once.

    Attributes:
        model, features, output: absolute paths.
        common: queries about all videos.
        count: number of shards.
        manifest: digest of the content of `corpus.json`.
    """

    model: Path
    features: Path
    output: Path
    common: tuple[Question, ...]
    count: int
    settings: Settings
    manifest: str

    def path(self, shard: Shard) -> Path:
        """Return the path of a shard's file."""
        return self.output / shard_name(shard.number, self.count, self.settings.form)


@dataclasses.dataclass(frozen=True)
class ShardResult:
    """The outcome of one shard.

    Attributes:
        pairs, errors: number of rows, and number of rows with an error instead of moments.
        problem: error message of a failed shard; None if its file is complete.
    """

    number: int
    pairs: int
    errors: int = 0
    attempts: int = 1
    problem: str | None = None


def digest_path(job: CorpusJob, shard: Shard) -> Path:
    """Return the path of the file that records the digest of a shard's file and the stamps of its features."""
    return job.output / DIGESTS / f"{shard.number:05d}.json"


def stamps_of(shard: Shard, stamp: Callable[[VideoRef], str]) -> dict[str, str]:
    """Return the stamp of the features of each known video of a shard."""
    return {queries.video.name: stamp(queries.video) for queries in shard.videos if queries.known}


def is_finished(job: CorpusJob, shard: Shard, source: FeatureSource) -> bool:
    """Return whether the file of a shard is complete; a damaged file is deleted, so that it is written again.

    Raises:
        OutputError: the features of a video changed since the shard was written, or its digests are missing.
    """
    path, digests = job.path(shard), digest_path(job, shard)
    if not path.is_file():
        return False
    if not digests.is_file():
        raise OutputError(
            f"The shard {path} has no record {digests} of the features that it was computed from. Remove the shard, or "
            "name another --output.",
            code="unknown_features",
        )
    try:
        record = read_json(digests, "digests of a shard", OutputError)
        is_intact = record["digest"] == json_digest({**record, "digest": ""}) and record["sha256"] == sha256(path)
    except (OutputError, KeyError, TypeError):
        is_intact = False
    if not is_intact:
        log.warning("%s does not match its digest in %s. It is grounded again.", path, digests)
        path.unlink()
        return False
    now = stamps_of(shard, source.stamp)
    before = record["features"]
    changed = [video for video in before if now.get(video) != before[video]]
    if changed:
        # The stamp of a file of many videos does not show which video changed, except for added and removed ones.
        video = next((video for video in changed if not (before[video] and now.get(video))), "")
        refs = {queries.video.name: queries.video for queries in shard.videos if queries.known}
        file = None if video or changed[0] not in refs else source.shared_file(refs[changed[0]])
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
    """Ground the shards of one job, one after the other. The model is opened with the first shard."""

    def __init__(self, job: CorpusJob) -> None:
        self.job = job
        self._query_error = functools.lru_cache(CACHED_QUERIES)(self._check_query)
        self._repeats = RepeatFilter(MAX_WARNINGS, by_template=True)

    def __call__(self, shard: Shard) -> ShardResult:
        """Ground a shard unless its file exists. The error of a failed shard is returned, not raised."""
        path = self.job.path(shard)
        try:
            self._check_manifest()
            if path.is_file():
                return ShardResult(shard.number, len(shard))
            attempts_path = self.job.output / ATTEMPTS / f"{shard.number:05d}"
            with _attempt(attempts_path) as attempts:
                if attempts > MAX_ATTEMPTS:
                    # The last line of the file is the current attempt.
                    raise OutputError(
                        f"The process ended in each of {attempts - 1} attempts, the last of them "
                        f"{attempts_path.read_text(encoding='utf-8').splitlines()[-2]}. Check its memory."
                    )
                with logged_once(self._repeats):
                    errors = self._write(shard, path)
                return ShardResult(shard.number, len(shard), errors, attempts)
        except GroundingError as error:
            return ShardResult(shard.number, len(shard), problem=f"{path.name}: {error}")
        # The result contains the message, and the log of the process the traceback.
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
        """Raise OutputError if the directory is not visible here, or was given to another job meanwhile.

        Workers may outlive a killed job for a moment, and must not write their shards to the next one.
        """
        try:
            digest = json_digest(json.loads((self.job.output / MANIFEST).read_bytes()))
        except (OSError, ValueError) as error:
            raise OutputError(
                f"{self.job.output} has no {MANIFEST} on {platform.node()}. Write to a file system that all machines "
                "mount at the same path."
            ) from error
        if digest != self.job.manifest:
            raise OutputError(
                f"{self.job.output} belongs to a job of other inputs now. Name another --output.",
                code="settings_mismatch",
            )

    def _write(self, shard: Shard, path: Path) -> int:
        """Write the rows of a shard, and return the number of rows with an error."""
        errors = 0
        # Stamps are taken first, so that a resumed job detects features that change while they are read.
        stamps = stamps_of(shard, self._source.stamp)
        with atomic_write(path) as temporary, open(temporary, "wb") as stream:
            with WRITERS[self.job.settings.form](stream) as write:
                for group in self._groups(shard):
                    for row in self._rows(group):
                        write(row)
                        errors += row["error"] is not None
            # The file must be complete after a power failure too, because a resumed job does not write it again.
            stream.flush()
            os.fsync(stream.fileno())
            self._check_manifest()
            # The digests are written before the shard, so that every shard has them.
            record = {"sha256": sha256(temporary), "features": stamps, "digest": ""}
            write_json(digest_path(self.job, shard), {**record, "digest": json_digest(record)})
        return errors

    def _groups(self, shard: Shard) -> Iterator[list[tuple[VideoQueries, VideoOrError]]]:
        """Yield groups of videos to ground together. Groups and batches depend on the shard only."""
        clock = self._grounder.manifest.features.clock
        loaded = self._source.load([queries.video for queries in shard.videos if queries.known], clock)
        group: list[tuple[VideoQueries, VideoOrError]] = []
        pairs, waiting = 0, 0
        for queries in shard.videos:
            if queries.known:
                video = self._prepare(next(loaded))
            else:
                video = f"There is no video {excerpt(queries.video.name)} in {self.job.features}. Check the name."
                video += near_name(self._names, queries.video.name)
            group.append((queries, video))
            pairs, waiting = pairs + len(queries), waiting + _bytes(video)
            if pairs >= BATCHES_PER_GROUP * self.job.settings.batch_size or waiting >= MAX_WAITING_BYTES:
                yield group
                group, pairs, waiting = [], 0, 0
        if group:
            yield group

    @functools.cached_property
    def _names(self) -> dict[str, str]:
        """Names of the videos of the corpus, for `near_name`."""
        return by_fold(video.name for video in self._source.listing())

    def _prepare(self, video: Video | str) -> VideoOrError:
        """Return a video checked and, for a split model, encoded; errors are passed through."""
        grounder = self._grounder
        if isinstance(video, str):
            return video
        try:
            if not grounder.is_pair:
                grounder.check_fits(video)
                return video
            return grounder.encode(video)
        except FeatureError as error:
            return str(error)

    def _rows(self, group: list[tuple[VideoQueries, VideoOrError]]) -> list[dict[str, Any]]:
        """Return a row for each query of a group, in order."""
        rows, valid_rows, pairs = [], [], []
        for queries, video in group:
            for question in queries.questions(self.job.common):
                problem = video if isinstance(video, str) else self._query_error(question.query)
                row: dict[str, Any] = {
                    "qid": question.qid,
                    "query": question.query,
                    "vid": queries.video.name,
                    "pred_relevant_windows": [],
                    "error": problem,
                }
                rows.append(row)
                if not isinstance(video, str) and problem is None:
                    valid_rows.append(row)
                    pairs.append((video, question.query))
        if pairs:
            settings = self.job.settings
            result = self._grounder.ground_batch(pairs, settings.top_k, settings.batch_size)
            for row, moments in zip(valid_rows, result):
                row["pred_relevant_windows"] = [[moment.start, moment.end, moment.score] for moment in moments]
        return rows

    def _check_query(self, query: str) -> str | None:
        """Return the error of a query that cannot be encoded, or None."""
        try:
            self._grounder.encode_query(query)
        except QueryError as error:
            return str(error)
        return None


def _bytes(video: VideoOrError) -> int:
    """Return the memory that a video takes, in bytes."""
    if isinstance(video, str):
        return 0
    parts = video.parts if isinstance(video, EncodedWindows) else (video,)
    return sum(part.features.nbytes for part in parts)


@contextlib.contextmanager
def _attempt(path: Path) -> Iterator[int]:
    """Record an attempt in a file, and yield the number of attempts. The file remains only if the process dies."""
    try:
        path.parent.mkdir(exist_ok=True)
        with open(path, "a+", encoding="utf-8") as stream:
            stream.write(f"process {os.getpid()} on {platform.node()}\n")
            stream.seek(0)
            attempts = len(stream.readlines())
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}. Choose another --output.") from error
    try:
        yield attempts
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


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
                # `check_one_kind` requires that all qids have one type.
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
        if len(rows) == PARQUET_GROUP_ROWS:
            flush()

    yield write
    if rows:
        flush()
    writer.close()


WRITERS: dict[Form, Callable[[BinaryIO], contextlib.AbstractContextManager[Write]]] = {
    "jsonl": _jsonl,
    "parquet": _parquet,
}
