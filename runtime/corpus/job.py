"""Plan a corpus, ground or resume its shards, and report the progress."""

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
from runtime.corpus.worker import ATTEMPTS, DIGESTS, CorpusJob, ShardResult, Worker, is_finished

log = logging.getLogger("drn")

# Where no bar can be drawn, a line reports the progress at this interval.
SECONDS_BETWEEN_LINES = 30.0


@dataclasses.dataclass(frozen=True)
class Result:
    """The outcome of a corpus run.

    Attributes:
        output: the directory.
        shards, pairs: of the corpus; a row for each pair.
        made, errors: the pairs that this run made rows of, and those of them that have no answer.
        seconds: that the run took, without planning.
    """

    output: Path
    shards: int
    pairs: int
    made: int
    errors: int
    seconds: float

    def __str__(self) -> str:
        whole = f"{self.pairs} pairs in {self.shards} shards in {self.output}"
        if not self.made:
            return f"{whole}: all were there already."
        before = f"; {self.pairs - self.made} were there before" if self.made < self.pairs else ""
        return (
            f"{whole}: {self.made} made in {self.seconds:.1f} s, {self.made / self.seconds:.1f} a second, "
            f"{self.errors} of them with an error instead of moments{before}."
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
    """Ground a corpus, or what is left of it; arguments as of `python -m runtime.ground_corpus`.

    Raises:
        GroundingError: the inputs are wrong, are not those that `output` was begun with, or a shard could not be made.
            Shards that are whole stay.
    """
    check_model_path(model)
    require_corpus_dir(output)
    questions = read_questions(queries)
    if settings.form == "parquet":
        check_one_kind(questions)
    source = open_source(features)
    if everywhere := sum(question.video is None for question in questions):
        log.info("%d of %d sentences name no video (vid) and are asked of every one.", everywhere, len(questions))
    common, shards = plan(source.listing(), questions, settings.shard_pairs)
    details = describe(model, queries, len(questions), source, settings)
    pairs = sum(map(len, shards))
    with locked(output):
        check_writable(output / MANIFEST, model, queries)
        # Looked at before the lock was had, another job could have put its shards there meanwhile.
        check_same(output, details)
        manifest = {**details, "pairs": pairs, "shards": len(shards)}
        write_json(output / MANIFEST, manifest)
        inputs = (model.resolve(), features.resolve(), output.resolve(), tuple(common))
        job = CorpusJob(*inputs, len(shards), settings, json_digest(manifest))
        left = [shard for shard in shards if not is_finished(job, shard, source)]
        missing = sum(map(len, left))
        if missing < pairs:
            log.info("%d of %d shards are there already.", len(shards) - len(left), len(shards))
        started, errors = time.monotonic(), 0
        with _cleaned(job.output), contextlib.closing(_run(job, left, actors, address)) as run:
            for done in _shown(run, pairs, missing):
                errors += done.errors
        if errors == missing > 0:
            log.warning(
                "No pair was answered: do model and features belong together? Each row's `error` says why not.",
                extra={"code": "no_answers"},
            )
        return Result(output, len(shards), pairs, missing, errors, time.monotonic() - started)


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
    """Yield what becomes of each shard while progress is shown; raise what ends the job."""
    num_grounded = errors = 0
    began = last_report = time.monotonic()
    with tqdm(total=pairs, initial=pairs - missing, desc="grounding", unit="pair", leave=False, disable=None) as bar:
        for done in run:
            if done.problem:
                raise GroundingError(
                    f"{done.problem} What is whole stays; run the same command again to go on.", code="shard_failed"
                )
            if done.attempts > 1:
                log.warning(
                    "Shard %d was begun %d times: the process that made it ended before it was done.",
                    done.number,
                    done.attempts,
                )
            yield done
            num_grounded, errors = num_grounded + done.pairs, errors + done.errors
            bar.set_postfix_str(f"{errors} errors", refresh=False)
            bar.update(done.pairs)
            if bar.disable and time.monotonic() - last_report >= SECONDS_BETWEEN_LINES:
                last_report = time.monotonic()
                rate = num_grounded / (last_report - began)
                log.info(
                    "%d of %d pairs, %.1f a second, %d errors; %s left.",
                    *(
                        pairs - missing + num_grounded,
                        pairs,
                        rate,
                        errors,
                        bar.format_interval((missing - num_grounded) / rate),
                    ),
                )


@contextlib.contextmanager
def _cleaned(output: Path) -> Iterator[None]:
    """Remove, before and after, what shards leave behind whose process was killed."""
    _clean(output)
    try:
        yield
    finally:
        _clean(output)


def _clean(output: Path) -> None:
    shutil.rmtree(output / ATTEMPTS, ignore_errors=True)
    for directory in (output, output / DIGESTS):
        remove_strays(directory)
