"""Questions that arrive together become one batch; one thread owns the model."""

from __future__ import annotations

import asyncio
import collections
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
from runtime.service.http_errors import HttpError

log = logging.getLogger("drn.service")

Pair = tuple[VideoInput, str]
Result = TypeVar("Result")

# How much the last batch counts in the mean rate that Retry-After is computed from.
RATE_SHARE = 0.1


@dataclasses.dataclass(frozen=True)
class BatchOptions:
    """The options of batching queries.

    Attributes:
        batch_size: most (video, sentence) pairs at a time.
        wait_ms: how long the first of a batch waits for others, where others are expected.
        queue_size: most pairs that wait; what would be more is refused.
    """

    batch_size: int = BATCH_SIZE
    wait_ms: float = 2.0
    queue_size: int = 512

    def __post_init__(self) -> None:
        if not (1 <= self.batch_size <= self.queue_size and 0 <= self.wait_ms <= 1000):
            raise GroundingError(
                f"--batch-size is 1 or more, --queue-size no less, and --wait-ms 0 to 1000; {self.batch_size}, "
                f"{self.queue_size} and {self.wait_ms:g} were given.",
                code="invalid_option",
            )


class _PendingRequest:
    """One request: its pairs, and its answers as they come."""

    def __init__(self, pairs: Sequence[Pair], top_k: int, loop: asyncio.AbstractEventLoop) -> None:
        self.pairs = pairs
        self.top_k = top_k
        self.answers: list[list[Moment]] = [[] for _ in pairs]
        self.missing = len(pairs)
        self.error: Exception | None = None
        self.dropped = False
        self.since = time.perf_counter()
        self.future: asyncio.Future[list[list[Moment]]] = loop.create_future()

    def settle(self) -> None:
        """Hand over the answers, in the loop's own thread."""
        if not self.future.done():
            if self.error is not None:
                self.future.set_exception(self.error)
            else:
                self.future.set_result(self.answers)


class Batcher:
    """Asks a model, in one thread that owns it, on behalf of many.

    The first question of a batch waits for others only if the batch before had company: whoever asks alone is answered
    at once.

    Args:
        grounder: the model.
        options: how questions wait.
        seen: called after every batch with how many pairs, the seconds they had waited, and the seconds the model took.
    """

    def __init__(
        self,
        grounder: Grounder,
        options: BatchOptions,
        seen: Callable[[int, Sequence[float], float], None] = lambda size, waited, took: None,
    ) -> None:
        self._grounder = grounder
        self._options = options
        self._seen = seen
        self._changed = threading.Condition()
        self._waiting: collections.deque[tuple[_PendingRequest, int]] = collections.deque()
        self._jobs: collections.deque[tuple[Callable[[], Any], Callable[[Any, Exception | None], None]]] = (
            collections.deque()
        )
        self._expected = 1
        self._pairs_per_second = 0.0
        self._ends = False
        self._thread = threading.Thread(target=self._work, name="drn-model", daemon=True)
        self._thread.start()

    @property
    def depth(self) -> int:
        """Pairs that wait."""
        return len(self._waiting)

    async def ask(self, pairs: Sequence[Pair], top_k: int) -> list[list[Moment]]:
        """Return for each pair what `Grounder.ground_batch` does; queries must be ones that the model can take.

        A caller that is cancelled takes along what of its pairs was not begun.

        Raises:
            Refusal: 429 if the queue is full, with Retry-After in seconds; 503 if the service ends.
        """
        requested = _PendingRequest(pairs, top_k, asyncio.get_running_loop())
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
                requested.dropped = True
                self._waiting = collections.deque(item for item in self._waiting if item[0] is not requested)
            raise

    async def do(self, job: Callable[[], Result]) -> Result:
        """Return what `job` does in the thread that owns the model; it goes before the next batch."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()

        def settle(result: Any, error: Exception | None) -> None:
            if not future.done():
                if error is None:
                    future.set_result(result)
                else:
                    future.set_exception(error)

        with self._changed:
            self._check_open()
            self._jobs.append((job, lambda result, error: _call(loop, settle, result, error)))
            self._changed.notify()
        return await future

    def close(self) -> None:
        """Finish what was taken and end the thread."""
        with self._changed:
            self._ends = True
            self._changed.notify()
        self._thread.join()

    def _check_open(self) -> None:
        if self._ends:
            raise HttpError(503, "The service is shutting down; ask another, or this one later.", "draining")

    def _full(self, pairs: int) -> HttpError:
        rate = self._pairs_per_second
        seconds = max(1, math.ceil(len(self._waiting) / rate)) if rate else 1
        return HttpError(
            429,
            f"{len(self._waiting)} sentences wait and at most {self._options.queue_size} may, so {pairs} more are not "
            f"taken; ask again in {seconds} s.",
            "queue_full",
            {"retry-after": str(seconds)},
        )

    def _work(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._jobs or self._ends):
                    self._changed.wait()
                jobs = [self._jobs.popleft() for _ in range(len(self._jobs))]
                if not jobs:
                    if not self._waiting:
                        return
                    chosen = self._gather()
            for job, settle in jobs:
                _run_in_worker(job, settle)
            if not jobs and chosen:
                self._answer(chosen)

    def _gather(self) -> list[tuple[_PendingRequest, int]]:
        """Return the pairs of the next batch, once enough wait or the first has waited long enough."""
        expected = min(self._expected, self._options.batch_size)
        until = time.perf_counter() + self._options.wait_ms / 1000
        while len(self._waiting) < expected and not (self._ends or self._jobs):
            left = until - time.perf_counter()
            if left <= 0 or not self._changed.wait(left):
                break
        chosen = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._options.batch_size))]
        # What was answered together asks together again, and what came in meanwhile is there already.
        self._expected = len(chosen) + len(self._waiting)
        return chosen

    def _answer(self, chosen: Sequence[tuple[_PendingRequest, int]]) -> None:
        started = time.perf_counter()
        answers = self._ground(chosen)
        took = time.perf_counter() - started
        rate = len(chosen) / max(took, 1e-6)
        self._pairs_per_second += (rate - self._pairs_per_second) * (RATE_SHARE if self._pairs_per_second else 1)
        done: dict[asyncio.AbstractEventLoop, list[_PendingRequest]] = {}
        for (requested, index), answer in zip(chosen, answers):
            if isinstance(answer, Exception):
                requested.error = answer
            else:
                # The picks of more are those of fewer, and others after them.
                requested.answers[index] = answer[: requested.top_k]
            requested.missing -= 1
            if not requested.missing:
                done.setdefault(requested.future.get_loop(), []).append(requested)
        self._seen(len(chosen), [started - requested.since for requested, _ in chosen], took)
        for loop, settled in done.items():
            _call(loop, _settle_all, settled)

    def _ground(self, chosen: Sequence[tuple[_PendingRequest, int]]) -> list[list[Moment] | Exception]:
        """Return the moments of every pair, or what went wrong with it: one that fails does not fail the others."""
        pairs = [requested.pairs[index] for requested, index in chosen]
        top_k = max(requested.top_k for requested, _ in chosen)
        try:
            return list(self._grounder.ground_batch(pairs, top_k, self._options.batch_size))
        except Exception as error:
            if len(chosen) == 1:
                log.error("The model failed on %r about %s.", pairs[0][1], pairs[0][0].name, exc_info=error)
                return [error]
            log.warning("A batch of %d failed (%s); asking one by one.", len(chosen), error)
            return [answer for item in chosen for answer in self._ground([item])]


def _settle_all(settled: Sequence[_PendingRequest]) -> None:
    for requested in settled:
        requested.settle()


def _run_in_worker(job: Callable[[], Any], settle: Callable[[Any, Exception | None], None]) -> None:
    try:
        result = job()
    except Exception as error:
        settle(None, error)
    else:
        settle(result, None)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: Any) -> None:
    """Call a function in the loop's thread; nobody waits there any more once the loop has ended."""
    try:
        loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
        if not loop.is_closed():
            raise
