"""Batch the queries that arrive together, and run the model in one thread."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from runtime.core.errors import GroundingError
from runtime.core.moments import Moment
from runtime.grounding.grounder import BATCH_SIZE, Grounder
from runtime.grounding.requests import VideoInput
from runtime.service.http_errors import HttpError, draining

log = logging.getLogger("drn.service")

Pair = tuple[VideoInput, str]
Result = TypeVar("Result")

# Weight of the last batch in the moving average of the rate that Retry-After is computed from.
RATE_WEIGHT = 0.1


@dataclasses.dataclass(frozen=True)
class BatchOptions:
    """The options of batching queries.

    Attributes:
        wait_ms: maximum time that the first pair of a batch waits for further pairs, in ms.
        queue_size: maximum number of waiting pairs; further requests get HTTP 429.
    """

    batch_size: int = BATCH_SIZE
    wait_ms: float = 2.0
    queue_size: int = 512

    def __post_init__(self) -> None:
        if not (1 <= self.batch_size <= self.queue_size and 0 <= self.wait_ms <= 1000):
            raise GroundingError(
                f"Expected 1 <= --batch-size <= --queue-size and --wait-ms from 0 to 1000, got {self.batch_size}, "
                f"{self.queue_size} and {self.wait_ms:g}. Correct the option.",
                code="invalid_option",
            )


class _PendingRequest:
    """A request whose pairs may be answered in several batches."""

    def __init__(self, pairs: Sequence[Pair], top_k: int, always_answer: bool, loop: asyncio.AbstractEventLoop) -> None:
        self.pairs = pairs
        self.top_k = top_k
        self.always_answer = always_answer
        self.answers: list[list[Moment]] = [[] for _ in pairs]
        self.missing = len(pairs)
        self.error: Exception | None = None
        self.since = time.perf_counter()
        self.future: asyncio.Future[list[list[Moment]]] = loop.create_future()

    def settle(self) -> None:
        """Set the result; call it in the thread of the event loop."""
        if not self.future.done():
            if self.error is not None:
                self.future.set_exception(self.error)
            else:
                self.future.set_result(self.answers)


class Batcher:
    """Ground the queries of many requests in batches, in the only thread that uses the model.

    The first query of a batch waits for others only if the previous batch had more than one: a single client gets its
    answers without delay.

    Args:
        on_batch: called after every batch with its number of pairs, the seconds that each waited, and the seconds that
            the model took.
    """

    def __init__(
        self,
        grounder: Grounder,
        options: BatchOptions,
        on_batch: Callable[[int, Sequence[float], float], None] = lambda pairs, waited, seconds: None,
    ) -> None:
        self._grounder = grounder
        self._options = options
        self._on_batch = on_batch
        self._changed = threading.Condition()
        self._waiting: collections.deque[tuple[_PendingRequest, int]] = collections.deque()
        self._jobs: collections.deque[tuple[Callable[[], Any], concurrent.futures.Future[Any]]] = collections.deque()
        self._expected = 1
        self._pairs_per_second = 0.0
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="drn-model", daemon=True)
        self._thread.start()

    @property
    def depth(self) -> int:
        """Number of waiting pairs."""
        return len(self._waiting)

    async def ground(self, pairs: Sequence[Pair], top_k: int, always_answer: bool = False) -> list[list[Moment]]:
        """Return the moments of each pair, as `Grounder.ground_batch`. Cancellation removes the waiting pairs.

        Args:
            pairs: videos and queries; `Grounder.encode_query` accepts each query.

        Raises:
            HttpError: 429 with Retry-After if the queue is full; 503 during shutdown.
        """
        requested = _PendingRequest(pairs, top_k, always_answer, asyncio.get_running_loop())
        with self._changed:
            self._check_open()
            if len(self._waiting) + len(pairs) > self._options.queue_size:
                raise self._full(len(pairs))
            self._waiting.extend((requested, index) for index in range(len(pairs)))
            self._changed.notify()
        try:
            return await requested.future
        except asyncio.CancelledError:
            with self._changed:
                self._waiting = collections.deque(item for item in self._waiting if item[0] is not requested)
            raise

    async def run(self, job: Callable[[], Result]) -> Result:
        """Run a function in the thread of the model before the next batch, and return its result.

        Raises:
            HttpError: 503 during shutdown.
        """
        future: concurrent.futures.Future[Result] = concurrent.futures.Future()
        with self._changed:
            self._check_open()
            self._jobs.append((job, future))
            self._changed.notify()
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Finish the accepted pairs and end the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _check_open(self) -> None:
        if self._is_closed:
            raise draining()

    def _full(self, pairs: int) -> HttpError:
        rate = self._pairs_per_second
        seconds = max(1, math.ceil(len(self._waiting) / rate)) if rate else 1
        return HttpError(
            429,
            f"The queue holds {len(self._waiting)} of at most {self._options.queue_size} queries, so {pairs} more do "
            f"not fit. Try again in {seconds} s.",
            "queue_full",
            {"retry-after": str(seconds)},
        )

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._jobs or self._is_closed):
                    self._changed.wait()
                jobs = [self._jobs.popleft() for _ in range(len(self._jobs))]
                if not jobs:
                    if not self._waiting:
                        return
                    chosen = self._gather()
            for job, future in jobs:
                _run_job(job, future)
            if not jobs and chosen:
                self._answer(chosen)

    def _gather(self) -> list[tuple[_PendingRequest, int]]:
        """Return the pairs of the next batch, once enough wait or the first has waited long enough."""
        expected = min(self._expected, self._options.batch_size)
        until = time.perf_counter() + self._options.wait_ms / 1000
        while len(self._waiting) < expected and not (self._is_closed or self._jobs):
            left = until - time.perf_counter()
            if left <= 0 or not self._changed.wait(left):
                break
        chosen = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._options.batch_size))]
        # Clients that were answered together send their next queries at the same time.
        self._expected = len(chosen) + len(self._waiting)
        return chosen

    def _answer(self, chosen: Sequence[tuple[_PendingRequest, int]]) -> None:
        started = time.perf_counter()
        answers: dict[tuple[_PendingRequest, int], list[Moment] | Exception] = {}
        for always_answer in (False, True):
            part = [item for item in chosen if item[0].always_answer is always_answer]
            if part:
                answers.update(zip(part, self._ground(part)))
        seconds = time.perf_counter() - started
        rate = len(chosen) / max(seconds, 1e-6)
        self._pairs_per_second += (rate - self._pairs_per_second) * (RATE_WEIGHT if self._pairs_per_second else 1)
        done: dict[asyncio.AbstractEventLoop, list[_PendingRequest]] = {}
        for (requested, index), answer in answers.items():
            if isinstance(answer, Exception):
                requested.error = answer
            else:
                # The best k moments are the first k of the best K.
                requested.answers[index] = answer[: requested.top_k]
            requested.missing -= 1
            if not requested.missing:
                done.setdefault(requested.future.get_loop(), []).append(requested)
        self._on_batch(len(chosen), [started - requested.since for requested, _ in chosen], seconds)
        for loop, settled in done.items():
            _settle_in_loop(loop, settled)

    def _ground(self, chosen: Sequence[tuple[_PendingRequest, int]]) -> list[list[Moment] | Exception]:
        """Return the moments of every pair, or its error; a pair that fails does not affect the others.

        All pairs have the same `always_answer`.
        """
        pairs = [requested.pairs[index] for requested, index in chosen]
        top_k = max(requested.top_k for requested, _ in chosen)
        try:
            presence = not chosen[0][0].always_answer
            return list(self._grounder.ground_batch(pairs, top_k, self._options.batch_size, presence=presence))
        except Exception as error:
            if len(chosen) == 1:
                log.error("The model failed on %r about %s.", pairs[0][1], pairs[0][0].name, exc_info=error)
                return [error]
            log.warning("A batch of %d pairs failed (%s). Its pairs are grounded one by one.", len(chosen), error)
            return [answer for item in chosen for answer in self._ground([item])]


def _run_job(job: Callable[[], Result], future: concurrent.futures.Future[Result]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = job()
    except Exception as error:
        future.set_exception(error)
    else:
        future.set_result(result)


def _settle_in_loop(loop: asyncio.AbstractEventLoop, settled: Sequence[_PendingRequest]) -> None:
    """Settle requests in the thread of their event loop, with one wake-up; a closed loop has no waiting requests."""

    def settle_all() -> None:
        for requested in settled:
            requested.settle()

    try:
        loop.call_soon_threadsafe(settle_all)
    except RuntimeError:
        if not loop.is_closed():
            raise
