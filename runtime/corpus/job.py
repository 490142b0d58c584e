"""Plan the shards of a corpus, ground or resume them, and report the progress."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from runtime.backends import check_model_path
from runtime.core.errors import GroundingError
from runtime.core.io.atomic_files import check_writable, locked, remove_strays, write_json
from runtime.core.io.digests import json_digest
from runtime.corpus.feature_sources import open_source
from runtime.corpus.queries import check_one_kind, read_questions
from runtime.corpus.ray_runner import run_on_ray
from runtime.corpus.sharding import MANIFEST, Settings, Shard, check_same, describe, plan, require_corpus_dir
from runtime.corpus.worker import ATTEMPTS, DIGESTS, CorpusJob, ShardResult, Worker, digest_path, is_finished

log = logging.getLogger("drn")

# Interval of the log lines that report the progress if stderr is not a terminal.
SECONDS_BETWEEN_LINES = 30.0


@dataclasses.dataclass(frozen=True)
class Result:
    """The outcome of a corpus run.

    Attributes:
        shards, pairs: numbers of shards and of pairs of the corpus; each pair is one row.
        grounded: number of pairs that this run grounded.
        errors: number of pairs of this run that have an error instead of moments.
        seconds: time of the run without planning.
        written, digests: shards that this run wrote, and the files of their digests.
    """

    output: Path
    shards: int
    pairs: int
    grounded: int
    errors: int
    seconds: float
    written: Sequence[Path] = ()
    digests: Sequence[Path] = ()

    def __str__(self) -> str:
        corpus = f"{self.pairs} pairs in {self.shards} shards in {self.output}"
        if not self.grounded:
            return f"{corpus}: all were grounded already."
        before = f"; {self.pairs - self.grounded} were grounded before" if self.grounded < self.pairs else ""
        rate = self.grounded / self.seconds
        return (
            f"{corpus}: {self.grounded} grounded in {self.seconds:.1f} s, {rate:.1f} per second, {self.errors} of them "
            f"with an error instead of moments{before}."
        )


def ground(
    model: Path,
    features: Path,
    queries: Path,
    output: Path,
    settings: Settings,
    *,
    actors: int | None = None,
    address: str | None = None,
) -> Result:
    """Ground a corpus, or resume it.

    Args:
        features: source of the features; see `open_source`.
        queries: JSONL file; see `read_questions`.
        actors: number of worker processes; 0 grounds in this process, None uses all free resources of the cluster.

    Raises:
        GroundingError: the inputs are invalid or differ from those of the shards in `output`, or a shard failed.
            Complete shards remain.
    """
    check_model_path(model)
    require_corpus_dir(output)
    questions = read_questions(queries)
    if settings.form == "parquet":
        check_one_kind(questions)
    source = open_source(features)
    if everywhere := sum(question.video is None for question in questions):
        log.info("%d of %d queries have no video (vid) and are grounded in all videos.", everywhere, len(questions))
    common, shards = plan(source.listing(), questions, settings.shard_pairs)
    details = describe(model, queries, len(questions), source, settings)
    pairs = sum(map(len, shards))
    with locked(output):
        check_writable(output / MANIFEST, model, queries)
        # Before the lock was acquired, another job could still write its shards.
        check_same(output, details)
        manifest = {**details, "pairs": pairs, "shards": len(shards)}
        write_json(output / MANIFEST, manifest)
        inputs = (model.resolve(), features.resolve(), output.resolve(), tuple(common))
        job = CorpusJob(*inputs, len(shards), settings, json_digest(manifest))
        left = [shard for shard in shards if not is_finished(job, shard, source)]
        missing = sum(map(len, left))
        if missing < pairs:
            log.info("%d of %d shards are complete already.", len(shards) - len(left), len(shards))
        started, errors = time.monotonic(), 0
        with contextlib.ExitStack() as stack:
            # Files of processes that were killed are removed before and after.
            _clean(output)
            stack.callback(_clean, output)
            run = stack.enter_context(contextlib.closing(_run(job, left, actors, address)))
            for result in _shown(run, pairs, missing):
                errors += result.errors
        if errors == missing > 0:
            log.warning(
                "All pairs failed. Check that model and features belong together; each row contains its `error`.",
                extra={"code": "no_answers"},
            )
        seconds = time.monotonic() - started
        written = [output / job.path(shard).name for shard in left]
        digests = [output / DIGESTS / digest_path(job, shard).name for shard in left]
        return Result(output, len(shards), pairs, missing, errors, seconds, written, digests)


def _run(
    job: CorpusJob, shards: Sequence[Shard], actors: int | None, address: str | None
) -> Generator[ShardResult, None, None]:
    if not shards:
        return
    if actors == 0:
        yield from map(Worker(job), shards)
    else:
        yield from run_on_ray(job, shards, actors, address)


def _shown(run: Iterator[ShardResult], pairs: int, missing: int) -> Iterator[ShardResult]:
    """Yield the result of each shard, and show the progress; raise GroundingError for a failed shard."""
    num_grounded = errors = 0
    started = last_report = time.monotonic()
    with tqdm(total=pairs, initial=pairs - missing, desc="grounding", unit="pair", leave=False, disable=None) as bar:
        for result in run:
            if result.problem:
                raise GroundingError(
                    f"{result.problem} Complete shards remain; run the same command again to resume.",
                    code="shard_failed",
                )
            if result.attempts > 1:
                log.warning(
                    "Shard %d took %d attempts, because its process ended before it was complete.",
                    result.number,
                    result.attempts,
                )
            yield result
            num_grounded, errors = num_grounded + result.pairs, errors + result.errors
            bar.set_postfix_str(f"{errors} errors", refresh=False)
            bar.update(result.pairs)
            if bar.disable and time.monotonic() - last_report >= SECONDS_BETWEEN_LINES:
                last_report = time.monotonic()
                rate = num_grounded / (last_report - started)
                remaining = bar.format_interval((missing - num_grounded) / rate)
                log.info(
                    "%d of %d pairs, %.1f per second, %d errors; %s remaining.",
                    *(pairs - missing + num_grounded, pairs, rate, errors, remaining),
                )


def _clean(output: Path) -> None:
    shutil.rmtree(output / ATTEMPTS, ignore_errors=True)
    for directory in (output, output / DIGESTS):
        remove_strays(directory)
