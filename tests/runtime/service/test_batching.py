"""Test `runtime.service.batching`: one thread answers many clients, each with its own moments."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from runtime import Grounder, Moment
from runtime.core.errors import GroundingError
from runtime.core.presence import Presence
from runtime.datasets.dataset import DataSet
from runtime.service.batching import Batcher, BatchOptions
from runtime.service.http_errors import HttpError
from tests.raising import raises
from tests.runtime.service.conftest import alike


class Held(Grounder):
    """A grounder that waits for permission and records its batches."""

    def __init__(self, inner: Grounder, fails_on: str = "") -> None:
        super().__init__(inner.backend)
        self.let = threading.Event()
        self.let.set()
        self.busy = threading.Event()
        self.batches: list[list[str]] = []
        self.fails_on = fails_on

    def ground_batch(
        self, pairs: Sequence[Any], top_k: int = 5, batch_size: int = 32, *, presence: bool = True
    ) -> list[list[Moment]]:
        self.batches.append([query for _, query in pairs])
        self.busy.set()
        assert self.let.wait(30)
        if self.fails_on and any(query == self.fails_on for _, query in pairs):
            raise RuntimeError("the model failed")
        return super().ground_batch(pairs, top_k, batch_size, presence=presence)


@pytest.fixture
def held(offline: Grounder) -> Held:
    return Held(offline)


@pytest.fixture(scope="module")
def pairs(planted: Path) -> list[Any]:
    data = DataSet(planted)
    annotations = data.annotations("test") + data.annotations("train")[:30]
    videos = {name: data.video(name) for name in {annotation.video for annotation in annotations}}
    return [(videos[annotation.video], annotation.sentence) for annotation in annotations]


def close_to(actual: Sequence[Moment], expected: Sequence[Moment]) -> bool:
    return alike([vars(moment) for moment in actual], [vars(moment) for moment in expected])


@contextlib.asynccontextmanager
async def busy(held: Held, pair: Any, **options: Any) -> AsyncIterator[Batcher]:
    """Yield a batcher whose model runs one query until the block sets `held.let`."""
    batcher = Batcher(held, BatchOptions(**options))
    held.let.clear()
    held.busy.clear()
    first = asyncio.create_task(batcher.ground([pair], 5))
    await asyncio.to_thread(held.busy.wait, 30)
    held.batches.clear()
    yield batcher
    held.let.set()
    assert len(await first) == 1
    batcher.close()


def ask(held: Held, pair: Any, *requests: tuple[Any, ...], **options: Any) -> list[Any]:
    """Return the answers to requests that wait together while the model runs a query; an error is an answer."""

    async def wait() -> list[Any]:
        async with busy(held, pair, **options) as batcher:
            tasks = [asyncio.create_task(batcher.ground(*request)) for request in requests]
            await asyncio.sleep(0)
            held.let.set()
            return await asyncio.gather(*tasks, return_exceptions=True)

    return asyncio.run(wait())


def test_callers_get_answers_to_their_own_queries(held: Held, pairs: list[Any]) -> None:
    # Groups of one to four queries at once. All answers differ, so that exchanged answers are detected.
    groups = [pairs[start : start + 1 + start % 4] for start in range(0, len(pairs), 3)]
    expected = [[held.ground(*pair) for pair in group] for group in groups]
    assert len({tuple(answer) for group in expected for answer in group}) == len(
        {(id(video), query) for group in groups for video, query in group}
    )
    actual = ask(held, pairs[0], *((group, 5) for group in groups), batch_size=8)
    for group, answers in zip(expected, actual, strict=True):
        assert all(close_to(*both) for both in zip(answers, group, strict=True))
    assert max(map(len, held.batches)) == 8


def test_requests_with_different_top_k_share_a_batch(held: Held, pairs: list[Any]) -> None:
    expected = [held.ground(*pairs[0], top_k=count) for count in (1, 3, 50)]
    answers = ask(held, pairs[1], *((pairs[:1], count) for count in (1, 3, 50)))
    assert all(close_to(actual[0], moments) for actual, moments in zip(answers, expected, strict=True))
    assert held.batches == [[pairs[0][1]] * 3]


def test_batch_may_mix_requests_with_and_without_threshold(held: Held, pairs: list[Any]) -> None:
    expected = held.ground(*pairs[0])
    held.manifest = dataclasses.replace(held.manifest, presence=Presence(1.0, 0.0, 1.0, 1, 1))
    always, refused, again = ask(held, pairs[1], *((pairs[:1], 5, always) for always in (True, False, True)))
    assert close_to(always[0], expected)
    assert close_to(again[0], expected)
    assert refused == [[]]


def test_failing_pair_does_not_fail_others_in_its_batch(offline: Grounder, pairs: list[Any]) -> None:
    held = Held(offline, fails_on=pairs[1][1])
    actual = ask(held, pairs[0], *(([pair], 5) for pair in pairs[:4]), batch_size=8)
    failed = [pair[1] == held.fails_on for pair in pairs[:4]]
    assert [isinstance(answer, RuntimeError) for answer in actual] == failed
    assert sum(failed) == 1
    for answer, pair in zip(actual, pairs, strict=False):
        if pair[1] != held.fails_on:
            assert close_to(answer[0], offline.ground(*pair))


def test_full_queue_returns_429_with_retry_after(held: Held, pairs: list[Any]) -> None:
    async def fill() -> HttpError:
        async with busy(held, pairs[0], batch_size=2, queue_size=4) as batcher:
            waiting = asyncio.create_task(batcher.ground(pairs[:3], 5))
            await asyncio.sleep(0)
            assert batcher.depth == 3
            with raises(HttpError, "queue_full", 3, 4, 2) as refused:
                await batcher.ground(pairs[:2], 5)
            held.let.set()
            assert len(await waiting) == 3
            return refused.value

    refusal = asyncio.run(fill())
    assert refusal.status == 429
    assert int(refusal.headers["retry-after"]) >= 1


def test_canceled_request_is_not_run(held: Held, pairs: list[Any]) -> None:
    async def cancel() -> None:
        async with busy(held, pairs[0]) as batcher:
            given_up = asyncio.create_task(batcher.ground(pairs[1:4], 5))
            await asyncio.sleep(0)
            given_up.cancel()
            await asyncio.gather(given_up, return_exceptions=True)
            assert batcher.depth == 0

    asyncio.run(cancel())
    assert held.batches == []


def test_closed_batcher_finishes_accepted_requests_only(held: Held, pairs: list[Any]) -> None:
    async def ask() -> None:
        held.let.clear()
        batcher = Batcher(held, BatchOptions(batch_size=2))
        tasks = [asyncio.create_task(batcher.ground([pair], 5)) for pair in pairs[:5]]
        await asyncio.to_thread(held.busy.wait, 30)
        closing = asyncio.create_task(asyncio.to_thread(batcher.close))
        held.let.set()
        await closing
        assert [len(answer) for answer in await asyncio.gather(*tasks)] == [1] * 5
        with raises(HttpError, "draining"):
            await batcher.ground(pairs[:1], 5)

    asyncio.run(ask())


def test_single_requests_do_not_wait_for_a_batch(held: Held, pairs: list[Any]) -> None:
    # Forty waits of a second would exceed the limit.
    async def ask() -> None:
        batcher = Batcher(held, BatchOptions(wait_ms=1000))
        for pair in pairs[:40]:
            await batcher.ground([pair], 5)
        batcher.close()

    asyncio.run(asyncio.wait_for(ask(), 20))


def test_concurrent_requests_are_batched_together(held: Held, pairs: list[Any]) -> None:
    async def ask() -> None:
        batcher = Batcher(held, BatchOptions(wait_ms=1000))
        held.let.clear()
        first = [asyncio.create_task(batcher.ground([pair], 5)) for pair in pairs[:3]]
        await asyncio.sleep(0.05)
        held.let.set()
        await asyncio.gather(*first)
        held.batches.clear()
        late = [asyncio.create_task(batcher.ground([pairs[0]], 5))]
        await asyncio.sleep(0.02)
        late += [asyncio.create_task(batcher.ground([pair], 5)) for pair in pairs[1:3]]
        await asyncio.gather(*late)
        batcher.close()

    asyncio.run(ask())
    assert held.batches[0] == [query for _, query in pairs[: len(held.batches[0])]]
    assert len(held.batches[0]) >= 2


def test_batcher_run_uses_the_model_thread(held: Held) -> None:
    async def run() -> str:
        batcher = Batcher(held, BatchOptions())
        name = await batcher.run(lambda: threading.current_thread().name)
        with pytest.raises(ZeroDivisionError):
            await batcher.run(lambda: 1 // 0)
        batcher.close()
        return name

    assert asyncio.run(run()) == "drn-model"


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"wait_ms": -1.0}, {"batch_size": 9, "queue_size": 8}])
def test_invalid_batch_options_are_rejected(wrong: dict[str, Any]) -> None:
    with raises(GroundingError, "invalid_option", "--batch-size", *(f"{value:g}" for value in wrong.values())):
        BatchOptions(**wrong)
