"""Test `benchmarks.acceptance.lease` in simulations: no task starts that cannot end in time."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.acceptance import leg_cuda
from benchmarks.acceptance.lease import (
    BUILDER,
    CLOSING_S,
    CUDA,
    ENGINE,
    MAX_TRIES,
    ORT_GPU,
    PREPARE,
    TASKS,
    TENSORRT,
    UNPACK_S,
    VERIFY_S,
    WHEELS,
    Chunks,
    Limits,
    Situation,
    Start,
    Stop,
    Unpack,
    Verify,
    Wait,
    decide,
    schedule,
)

LIMITS = Limits()
DONE = {WHEELS.name: "done", PREPARE.name: "done", CUDA.name: "done"}
NAMES = tuple(f"chunk_{number:03d}.bin" for number in range(9))


@dataclasses.dataclass
class Event:
    """What a simulated lease did: seconds of the lease at which an action began and ended."""

    begin_s: float
    end_s: float
    action: Any
    call: int
    call_began_s: float


class Machine:
    """A lease as `benchmarks.acceptance.lease_run` carries it out, on a clock that is only counted.

    Args:
        draw: a Hypothesis data object: what tasks take, how they end, how long calls take to arrive.
        limits: of the lease.
        chunks: how many chunks TensorRT has; None if it was not brought.
    """

    def __init__(self, draw: st.DataObject, limits: Limits, chunks: int | None) -> None:
        self.draw, self.limits = draw, limits
        self.now = draw.draw(st.floats(0, 200), "used before")
        self.left = [f"chunk_{number:03d}.bin" for number in range(chunks or 0)]
        self.library = None if chunks is None else Chunks(missing=tuple(self.left))
        self.outcomes: dict[str, Any] = {}
        self.tries: dict[str, int] = {}
        self.background: dict[str, tuple[float, str]] = {}
        self.transfers: list[float] = []
        self.plan_b = ""
        self.plans: list[str] = []
        self.events: list[Event] = []
        self.calls = 0

    def run(self) -> list[Event]:
        for _ in range(60):
            stop = self.call()
            if not stop.again:
                break
            seconds = self.draw.draw(st.floats(1, 90), "transfer")
            self.now += seconds
            self.transfers.append(seconds)
        return self.events

    def bring(self) -> None:
        if self.library and self.library.missing:
            name, *rest = self.library.missing
            self.library = dataclasses.replace(self.library, waiting=(*self.library.waiting, name), missing=tuple(rest))

    def call(self) -> Stop:
        began = self.now
        self.calls += 1
        self.bring()
        for _ in range(400):
            for name, (end, outcome) in list(self.background.items()):
                if end <= self.now:
                    self.outcomes[name] = outcome
                    del self.background[name]
            seen = Situation(
                self.now, self.now - began, self.outcomes, self.tries, frozenset(self.background), frozenset(),
                {TENSORRT: self.library} if self.library else {}, self.transfers, True, self.plan_b,
            )  # fmt: skip
            decision = decide(seen, self.limits)
            self.plan_b = decision.plan_b
            self.plans.append(decision.plan)
            begin = self.now
            self.act(decision.action)
            self.events.append(Event(begin, self.now, decision.action, self.calls, began))
            if isinstance(decision.action, Stop):
                return decision.action
        raise AssertionError("the call did not end")

    def act(self, action: Any) -> None:
        draw = self.draw
        if isinstance(action, Wait):
            self.now += 1.0
        elif isinstance(action, Unpack):
            assert self.library is not None
            self.now += draw.draw(st.floats(0.1, min(action.limit_s, 20.0)))
            bad = draw.draw(st.integers(0, 30)) == 0
            self.library = dataclasses.replace(
                self.library, waiting=self.library.waiting[1:], failed="it is damaged" if bad else ""
            )
        elif isinstance(action, Verify):
            assert self.library is not None
            self.now += draw.draw(st.floats(0.1, min(action.limit_s, 30.0)))
            verified = draw.draw(st.integers(0, 8)) > 0
            self.library = dataclasses.replace(
                self.library, verified=verified, failed="" if verified else "a file differs"
            )
        elif isinstance(action, Start):
            task = action.task
            assert all(self.outcomes.get(name) == "done" for name in task.after)
            assert self.outcomes.get(task.name) in (None, "cut off")
            self.tries[task.name] = self.tries.get(task.name, 0) + 1
            seconds = draw.draw(st.floats(0.5, 1.5 * task.max_s), task.name)
            well = "done" if draw.draw(st.integers(0, 6)) > 0 else "failed"
            if seconds > action.limit_s:
                well = "failed" if action.limit_s >= task.max_s else "cut off"
                seconds = action.limit_s
            if task.background:
                self.background[task.name] = (self.now + seconds, well)
            else:
                self.now += seconds
                self.outcomes[task.name] = well


@settings(max_examples=200, deadline=None)
@given(st.data(), st.floats(2, 15), st.floats(1, 10), st.none() | st.integers(1, 9))
def test_lease_obeys_all_rules(draw: st.DataObject, minutes: float, call_minutes: float, chunks: int | None) -> None:
    machine = Machine(draw, Limits(60 * minutes, 60 * call_minutes), chunks)
    events = machine.run()
    check_times(events, machine.limits)
    check_order(events, machine)
    check_plan_b(events, machine)


def check_times(events: list[Event], limits: Limits) -> None:
    """A task starts only if it fits into the rest of the lease and of the call."""
    for event in events:
        call_end = event.call_began_s + limits.call_s
        if isinstance(event.action, Start):
            task = event.action.task
            assert event.begin_s + task.expected_s <= min(limits.lease_s, call_end) - CLOSING_S + 1e-6
            assert event.begin_s + event.action.limit_s <= limits.lease_s - CLOSING_S + 1e-6
            assert event.action.limit_s <= task.max_s
        if isinstance(event.action, (Start, Unpack, Verify)):
            assert event.end_s <= min(limits.lease_s, call_end) + 1e-6


def check_order(events: list[Event], machine: Machine) -> None:
    """A task starts after those that it needs."""
    begun: list[str] = []
    for task in (event.action.task for event in events if isinstance(event.action, Start)):
        assert set(task.after) <= {PREPARE.name, *begun}
        assert task.library != TENSORRT or (machine.library is not None and machine.library.verified)
        begun.append(task.name)
    assert all(begun.count(name) <= MAX_TRIES for name in begun)


def check_plan_b(events: list[Event], machine: Machine) -> None:
    """Plan B is never reverted."""
    assert machine.plans == sorted(machine.plans)
    if machine.library is None:
        assert set(machine.plans) == {"B"}
    if machine.plan_b:
        later = [event.action for event in events[machine.plans.index("B") :]]
        assert not [a for a in later if isinstance(a, Start) and a.task.library == TENSORRT]
        assert not [a for a in later if isinstance(a, Stop) and any(name.startswith(TENSORRT) for name in a.bring)]


@pytest.mark.parametrize(
    ("transfers", "expected"),
    [((20.0,), "A"), ((36.0,), "A"), ((36.0, 40.0), "B"), ((36.0, 20.0), "A"), ((75.0,), "B")],
)
def test_slow_transfers_choose_plan_b(transfers: tuple[float, ...], expected: str) -> None:
    used = 120.0 + sum(transfers)
    count = 1 + len(transfers)
    library = Chunks(NAMES[count - 1 : count], NAMES[count:])
    seen = Situation(used, 0.0, DONE, chunks={TENSORRT: library}, transfers_s=transfers, more=True)
    assert decide(seen, LIMITS).plan == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "A"),
        ({"chunks": {}}, "B"),
        ({"chunks": {}, "importable": frozenset({TENSORRT})}, "A"),
        ({"chunks": {TENSORRT: Chunks(failed="it is damaged")}}, "B"),
        ({"outcomes": {**DONE, BUILDER.name: "failed"}}, "B"),
        # An engine that was rejected or not built does not make torch more valuable than int8.
        ({"outcomes": {**DONE, BUILDER.name: "done", ENGINE.name: "failed"}}, "A"),
        ({"plan_b": "the calls were slow"}, "B"),
        ({"used_s": 10 * 60.0, "chunks": {TENSORRT: Chunks(waiting=NAMES[:3])}}, "B"),
        ({"used_s": 12 * 60.0}, "A"),
    ],
)
def test_plan_b_decision_has_a_reason(change: dict[str, Any], expected: str) -> None:
    seen = Situation(used_s=150.0, outcomes=DONE, chunks={TENSORRT: Chunks(verified=True)})
    decision = decide(dataclasses.replace(seen, **change), LIMITS)
    assert decision.plan == expected
    assert bool(decision.plan_b) == (expected == "B")


def test_missing_chunks_stop_the_call_immediately() -> None:
    seen = Situation(150.0, 30.0, DONE, chunks={TENSORRT: Chunks(missing=NAMES[1:3])}, more=True)
    action = decide(seen, LIMITS).action
    assert action == Stop("more chunks are to come", (f"{TENSORRT}/{NAMES[1]}", f"{TENSORRT}/{NAMES[2]}"), again=True)


def test_killed_task_is_retried_up_to_max_tries() -> None:
    outcomes = {**DONE, BUILDER.name: "done", ENGINE.name: "cut off"}
    seen = Situation(300.0, 0.0, outcomes, {ENGINE.name: 1}, chunks={TENSORRT: Chunks(verified=True)})
    action = decide(seen, LIMITS).action
    assert isinstance(action, Start)
    assert action.task is ENGINE
    again = decide(dataclasses.replace(seen, tries={ENGINE.name: MAX_TRIES}), LIMITS).action
    assert isinstance(again, Start)
    assert again.task is not ENGINE


def test_short_call_stops_and_requests_another() -> None:
    seen = Situation(
        300.0, LIMITS.call_s - 60.0, {**DONE, BUILDER.name: "done"}, chunks={TENSORRT: Chunks(verified=True)}
    )
    left = [task for task in TASKS["A"] if task.expected_s <= 60.0 - CLOSING_S and "prepare" in task.after]
    action = decide(seen, LIMITS).action
    # Something shorter runs first; once that is done, the engine needs another call.
    assert isinstance(action, Start)
    assert action.task in left
    ended = {**seen.outcomes, **{task.name: "done" for task in left}}
    assert decide(dataclasses.replace(seen, outcomes=ended), LIMITS).action == Stop("this call is over", again=True)


@pytest.mark.parametrize("library", [Chunks(waiting=NAMES[:1]), Chunks()])
def test_unpacking_is_limited_to_the_remaining_call_time(library: Chunks) -> None:
    seen = Situation(150.0, LIMITS.call_s - CLOSING_S - VERIFY_S - 1.0, DONE, chunks={TENSORRT: library})
    action = decide(seen, LIMITS).action
    assert isinstance(action, (Unpack, Verify))
    assert action.limit_s == pytest.approx(VERIFY_S + 1.0)
    over = dataclasses.replace(seen, call_used_s=LIMITS.call_s - CLOSING_S - 1.0)
    assert decide(over, LIMITS).action == Stop("this call is over", again=True)


def test_failed_preparation_leaves_no_task_to_start() -> None:
    outcomes = {WHEELS.name: "done", PREPARE.name: "failed", CUDA.name: "done"}
    seen = Situation(200.0, 0.0, outcomes, plan_b="no TensorRT")
    assert decide(seen, LIMITS).action == Stop("no task is left that can end in time")


@pytest.mark.parametrize("transfer_s", [10.0, 20.0, 30.0])
def test_schedule_fits_all_tasks_to_int8_in_lease(transfer_s: float) -> None:
    lines, plan_b = schedule(LIMITS, NAMES, transfer_s)
    names = [line.what for line in lines]
    assert not plan_b
    assert {"builder", "engine", "engine answers and bar", "torch speed"} <= set(names)
    assert "int8" in names
    assert max(line.end_s for line in lines) <= LIMITS.lease_s


def test_onnxruntime_gpu_is_uploaded_last_and_under_plan_b() -> None:
    library = {ORT_GPU: Chunks(missing=NAMES[:4])}
    waiting = Situation(200.0, 0.0, {WHEELS.name: "done", CUDA.name: "done"}, running=frozenset({PREPARE.name}),
                        chunks=library, more=True, plan_b="no TensorRT")  # fmt: skip
    assert decide(waiting, LIMITS).action == Wait(PREPARE.name)
    ended = {task.name: "done" for task in TASKS["B"] if task.library != ORT_GPU and task.name != "torch.compile"}
    seen = dataclasses.replace(waiting, running=frozenset(), outcomes=ended)
    action = decide(seen, LIMITS).action
    assert isinstance(action, Stop)
    assert action.bring[0] == f"{ORT_GPU}/{NAMES[0]}"
    # Without further calls it is not waited for.
    alone = decide(dataclasses.replace(seen, more=False), LIMITS).action
    assert isinstance(alone, Start)
    assert alone.task.name == "torch.compile"


def test_expected_task_times_are_within_their_limits() -> None:
    for task in {*TASKS["A"], *TASKS["B"]}:
        assert 0 < task.expected_s <= task.max_s
    assert CUDA.max_s > leg_cuda.CHILD_SECONDS
    assert UNPACK_S < VERIFY_S
