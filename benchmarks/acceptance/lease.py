"""Decide what to run next on a GPU machine that is available for minutes only.

A decision is a pure function of the time used, the packages that have arrived, and the tasks that have ended.
`benchmarks.acceptance.lease_run` collects these values and executes the decisions.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Literal

Plan = Literal["A", "B"]
# done: all steps have a result; failed: no usable result; cut off: the call ended first, and the task may be repeated.
Outcome = Literal["done", "failed", "cut off"]
TENSORRT, ORT_GPU = "tensorrt", "onnxruntime-gpu"

# Reserved for ending a process and writing the report.
CLOSING_S = 20.0
# A task that was cut off this many times is not repeated.
MAX_TRIES = 2
# Start of a machine.
START_S = 35.0
# Transfer of one chunk, before one has been measured. The first machine of this kind took 5 s.
TRANSFER_S = 8.0
# After two calls that are slower, the chunks of TensorRT would use up the lease.
SLOW_TRANSFER_S = 35.0
UNPACK_S, VERIFY_S = 3.0, 5.0


@dataclasses.dataclass(frozen=True)
class Task:
    """A process of the lease.

    Attributes:
        name: unique name.
        expected_s: the task starts only if this many seconds are left.
        max_s: the task is stopped after this many seconds, and has failed.
        leg: leg of `benchmarks.gpu` to run; "" for tasks of the lease itself.
        steps: steps of the leg; all if empty.
        after: tasks that must be done before.
        library: additional library that it needs, or "".
        background: whether it runs concurrently with tasks that do not wait for it.
    """

    name: str
    expected_s: float
    max_s: float
    leg: str = ""
    steps: tuple[str, ...] = ()
    after: tuple[str, ...] = ("wheels", "prepare")
    library: str = ""
    background: bool = False


# Expected times are those of an H200 with 16 cores (2026-11-29), rounded up, where it ran the task.
WHEELS = Task("wheels", 2, 60, after=())
PREPARE = Task("prepare", 100, 300, "prepare", after=("wheels",), background=True)
CUDA = Task("cuda", 15, 60, "cuda", after=())
BUILDER = Task("builder", 20, 60, "tensorrt", ("builder",), ("wheels",), TENSORRT)
ENGINE = Task("engine", 120, 270, "tensorrt", ("tensorrt, fp16, pair", "layers, fp16"),
              ("wheels", "prepare", "builder"), TENSORRT)  # fmt: skip
BAR = Task(
    "engine answers and bar", 30, 120, "tensorrt",
    ("tensorrt, fp16, pair, answers", "the bar", "the LSTM as a loop and written out", "where the time goes: phases",
     "where the time goes: layers", "rejected engines"),
    ("wheels", "prepare", "engine"), TENSORRT,
)  # fmt: skip
SPEED = Task("torch speed", 80, 130, "torch", ("machine", "speed"))
DELIVERY = Task("delivery of batches", 30, 90, "torch", ("training speed",))
INT8 = Task(
    "int8", 130, 200, "tensorrt",
    ("tensorrt, int8, pair", "layers, int8", "tensorrt, int8, pair, answers", "the bar, int8"),
    ("wheels", "prepare", "builder"), TENSORRT,
)  # fmt: skip
ORT = Task("onnxruntime", 60, 150, "ort-cuda", library=ORT_GPU)
DEFAULTS = Task(
    "engine with the default effort", 240, 360, "tensorrt",
    ("tensorrt, fp16, pair, default effort", "the bar, default effort"),
    ("wheels", "prepare", "engine"), TENSORRT,
)  # fmt: skip
FAULTS = Task(
    "faults", 20, 120, "tensorrt",
    ("fault: GPU absent", "fault: threads", "fault: fork", "fault: the process ends under a call",
     "fault: out of memory", "fault: opening"),
    ("wheels", "prepare", "engine"), TENSORRT,
)  # fmt: skip
ANSWERS = Task("torch answers", 20, 60, "torch", ("machine", "answers, TF32 off", "answers, as torch comes"))
LOSSES = Task("losses", 30, 90, "torch", ("losses, fp32", "losses, bf16", "losses, fp16"))
PROFILE = Task("torch profile", 15, 60, "torch", ("where the time goes",))
OTHERS = Task(
    "other precisions", 120, 200, "tensorrt",
    ("tensorrt, bf16, pair", "tensorrt, bf16, pair, answers", "tensorrt, fp8, pair", "tensorrt, fp8, pair, answers"),
    ("wheels", "prepare", "builder"), TENSORRT,
)  # fmt: skip
COMPILE = Task("torch.compile", 90, 150, "torch", ("speed, torch.compile",))

# In order of value. The chunks of a library are unpacked before its first task.
TASKS: dict[Plan, tuple[Task, ...]] = {
    "A": (
        WHEELS, PREPARE, CUDA, BUILDER, ENGINE, BAR, SPEED, DELIVERY, INT8, DEFAULTS, ORT, FAULTS, ANSWERS, LOSSES,
        PROFILE, COMPILE, OTHERS,
    ),
    "B": (WHEELS, PREPARE, CUDA, ANSWERS, SPEED, LOSSES, DELIVERY, PROFILE, ORT, COMPILE),
}  # fmt: skip
# Plan A needs these for any result that plan B does not have.
ESSENTIAL = (BUILDER, ENGINE, BAR)
# Plan to the library whose chunks it waits for.
CHUNKED: dict[Plan, str] = {"A": TENSORRT, "B": ORT_GPU}


@dataclasses.dataclass(frozen=True)
class Chunks:
    """The state of a library that arrives in chunks.

    Attributes:
        waiting: names of chunks that have arrived and are not unpacked.
        missing: names of chunks that have not arrived.
        verified: whether the files of the library are checked.
        failed: reason why the library cannot be used, or "".
    """

    waiting: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    verified: bool = False
    failed: str = ""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Maximum seconds of the lease and of one call."""

    lease_s: float = 13 * 60.0
    call_s: float = 9.5 * 60.0


@dataclasses.dataclass(frozen=True)
class Situation:
    """The input of a decision.

    Attributes:
        used_s: seconds of the lease so far.
        call_used_s: seconds of this call so far.
        outcomes: outcomes of the tasks that have ended.
        tries: number of starts of each task.
        running: running background tasks.
        importable: libraries that can be imported without chunks.
        chunks: libraries that arrive in chunks.
        transfers_s: seconds between the end of each earlier call and the start of the next.
        more: whether later calls bring more chunks.
        plan_b: reason of an earlier decision for plan B, or "" under plan A.
    """

    used_s: float = 0.0
    call_used_s: float = 0.0
    outcomes: Mapping[str, Outcome] = dataclasses.field(default_factory=dict)
    tries: Mapping[str, int] = dataclasses.field(default_factory=dict)
    running: frozenset[str] = frozenset()
    importable: frozenset[str] = frozenset()
    chunks: Mapping[str, Chunks] = dataclasses.field(default_factory=dict)
    transfers_s: Sequence[float] = ()
    more: bool = False
    plan_b: str = ""


@dataclasses.dataclass(frozen=True)
class Action:
    """The next action: one of the subclasses."""


@dataclasses.dataclass(frozen=True)
class Start(Action):
    """Start a task, and stop it after `limit_s`."""

    task: Task
    limit_s: float


@dataclasses.dataclass(frozen=True)
class Unpack(Action):
    """Unpack one chunk of a library, within `limit_s`."""

    library: str
    chunk: str
    limit_s: float


@dataclasses.dataclass(frozen=True)
class Verify(Action):
    """Check all files of a library, within `limit_s`."""

    library: str
    limit_s: float


@dataclasses.dataclass(frozen=True)
class Wait(Action):
    """Wait until a background task ends, at most a second, and decide again."""

    task: str


@dataclasses.dataclass(frozen=True)
class Stop(Action):
    """End this call.

    Attributes:
        reason: reason, for messages.
        bring: chunks to copy with the next call, as library/chunk.
        again: whether another call can continue.
    """

    reason: str
    bring: tuple[str, ...] = ()
    again: bool = False


@dataclasses.dataclass(frozen=True)
class Decision:
    """The next action, the plan, and the reason for plan B or ""."""

    action: Action
    plan: Plan
    plan_b: str


def decide(seen: Situation, limits: Limits) -> Decision:
    """Return the next action.

    A task starts only if its expected time and `CLOSING_S` fit into the lease and the call.
    """
    plan_b = seen.plan_b or _why_plan_b(seen, limits)
    plan: Plan = "B" if plan_b else "A"
    return Decision(_next_action(seen, limits, plan), plan, plan_b)


def lease_left_s(seen: Situation, limits: Limits) -> float:
    """Return the seconds that tasks may still use in the lease."""
    return limits.lease_s - CLOSING_S - seen.used_s


def left_s(seen: Situation, limits: Limits) -> float:
    """Return the seconds that tasks may use in this call."""
    return min(lease_left_s(seen, limits), limits.call_s - CLOSING_S - seen.call_used_s)


def _why_plan_b(seen: Situation, limits: Limits) -> str:
    """Return the reason for plan B, without TensorRT, or ""."""
    if seen.outcomes.get(BUILDER.name) == "failed":
        return "TensorRT could not be imported or did not create a builder"
    if TENSORRT in seen.importable:
        return ""
    chunks = seen.chunks.get(TENSORRT)
    if chunks is None:
        return "TensorRT cannot be imported and no chunks of it have arrived"
    if chunks.failed:
        return chunks.failed
    if chunks.verified:
        return ""
    slow = [seconds for seconds in seen.transfers_s if seconds > SLOW_TRANSFER_S]
    if chunks.missing and len(slow) >= 2 and len(slow) == len(seen.transfers_s):
        return f"every call took over {SLOW_TRANSFER_S:.0f} s to arrive"
    ready = _ready_s(chunks, seen.transfers_s)
    essential = sum(task.expected_s for task in ESSENTIAL if task.name not in seen.outcomes)
    left = lease_left_s(seen, limits)
    if ready + essential > left:
        return (
            f"TensorRT would be ready in {ready:.0f} s and its first engine takes {essential:.0f} s, but "
            f"{max(left, 0):.0f} s are left"
        )
    return ""


def _next_action(seen: Situation, limits: Limits, plan: Plan) -> Action:
    """Return the action for the most valuable task that can run."""
    waits_for, later = "", False
    for task in TASKS[plan]:
        if _has_ended(task, seen) or task.name in seen.running or _is_lost(task, seen, plan):
            continue
        if task.library and not _is_usable(task.library, seen):
            action = _fetch(task, seen, limits) if task.library == CHUNKED[plan] else None
            # Under plan B, tasks that wait for a background task are more valuable than a missing library.
            if action is None or (isinstance(action, Stop) and waits_for and plan == "B"):
                continue
            return action
        fits_lease = task.expected_s <= lease_left_s(seen, limits)
        if not fits_lease:
            continue
        if any(name in seen.running for name in task.after):
            waits_for = waits_for or next(name for name in task.after if name in seen.running)
            continue
        if any(seen.outcomes.get(name) != "done" for name in task.after):
            continue
        if task.expected_s > left_s(seen, limits):
            later = True
            continue
        # A background task continues after the call.
        left = lease_left_s(seen, limits) if task.background else left_s(seen, limits)
        return Start(task, min(task.max_s, left))
    if waits_for and left_s(seen, limits) > 0:
        return Wait(waits_for)
    if waits_for or later:
        return Stop("this call is over", again=True)
    return Stop("no task is left that can end in time")


def _has_ended(task: Task, seen: Situation) -> bool:
    outcome = seen.outcomes.get(task.name)
    if outcome == "cut off":
        return seen.tries.get(task.name, 0) >= MAX_TRIES
    return outcome is not None


def _is_lost(task: Task, seen: Situation, plan: Plan) -> bool:
    """Return whether a task can never start, because one that it depends on has failed."""
    known = {other.name: other for other in TASKS[plan]}
    return any(
        name not in known or (_has_ended(known[name], seen) and seen.outcomes[name] != "done") for name in task.after
    )


def _is_usable(library: str, seen: Situation) -> bool:
    chunks = seen.chunks.get(library)
    return library in seen.importable or (chunks is not None and chunks.verified)


def _ready_s(chunks: Chunks, transfers_s: Sequence[float]) -> float:
    """Return the seconds until a library is unpacked and verified, if each call brings one chunk."""
    transfer = statistics.median(transfers_s) if transfers_s else TRANSFER_S
    count = len(chunks.missing)
    return UNPACK_S * (count + len(chunks.waiting)) + transfer * count + VERIFY_S


def _fetch(task: Task, seen: Situation, limits: Limits) -> Action | None:
    """Return the next action towards the library of a task, or None if it cannot arrive in time."""
    chunks = seen.chunks.get(task.library)
    if chunks is None or chunks.failed or (chunks.missing and not seen.more):
        return None
    if _ready_s(chunks, seen.transfers_s) + task.expected_s > lease_left_s(seen, limits):
        return None
    left = left_s(seen, limits)
    if chunks.waiting:
        if left < UNPACK_S:
            return Stop("this call is over", again=True)
        return Unpack(task.library, chunks.waiting[0], min(60.0, left))
    if chunks.missing:
        return Stop("more chunks are to come", tuple(f"{task.library}/{name}" for name in chunks.missing), again=True)
    if left < VERIFY_S:
        return Stop("this call is over", again=True)
    return Verify(task.library, min(90.0, left))


@dataclasses.dataclass(frozen=True)
class Scheduled:
    """A line of a schedule, in seconds since the start of the lease."""

    begin_s: float
    end_s: float
    what: str


def schedule(
    limits: Limits, chunks: Sequence[str], transfer_s: float = TRANSFER_S, before_s: float = START_S
) -> tuple[list[Scheduled], str]:
    """Return the expected schedule.

    Args:
        limits: maximum seconds of the lease and of a call.
        chunks: names of the chunks of TensorRT; the last arrives with the first call.
        transfer_s: seconds between later calls.
        before_s: seconds of the lease before the first call.

    Returns:
        The lines of the schedule, and the reason for plan B or "".
    """
    now, call_began = before_s, before_s
    outcomes: dict[str, Outcome] = {}
    ends: dict[str, float] = {}
    known = {TENSORRT: Chunks(tuple(chunks[-1:]), tuple(chunks[:-1]))} if chunks else {}
    transfers: list[float] = []
    lines: list[Scheduled] = []
    plan_b = ""
    while True:
        outcomes.update({name: "done" for name, end in ends.items() if end <= now})
        running = frozenset(name for name, end in ends.items() if end > now)
        more = any(entry.missing for entry in known.values())
        seen = Situation(now, now - call_began, outcomes, {}, running, frozenset(), known, transfers, more, plan_b)
        decision = decide(seen, limits)
        plan_b, action = decision.plan_b, decision.action
        if isinstance(action, Stop):
            if not action.again:
                return lines, plan_b
            lines.append(
                Scheduled(now, now + transfer_s, f"next call: {action.bring[0]}" if action.bring else "next call")
            )
            now = call_began = now + transfer_s
            transfers.append(transfer_s)
            for library, entry in known.items():
                if action.bring and entry.missing:
                    known[library] = dataclasses.replace(entry, waiting=entry.missing[:1], missing=entry.missing[1:])
            continue
        begin = now
        if isinstance(action, Wait):
            now = ends[action.task]
            lines.append(Scheduled(begin, now, f"wait for {action.task}"))
        elif isinstance(action, Unpack):
            now += UNPACK_S
            entry = known[action.library]
            known[action.library] = dataclasses.replace(entry, waiting=entry.waiting[1:])
            lines.append(Scheduled(begin, now, f"unpack {action.library}/{action.chunk}"))
        elif isinstance(action, Verify):
            now += VERIFY_S
            known[action.library] = dataclasses.replace(known[action.library], verified=True)
            lines.append(Scheduled(begin, now, f"verify {action.library}"))
        elif isinstance(action, Start) and action.task.background:
            ends[action.task.name] = now + action.task.expected_s
            lines.append(Scheduled(begin, ends[action.task.name], f"{action.task.name} (in the background)"))
        else:
            assert isinstance(action, Start)
            now += action.task.expected_s
            outcomes[action.task.name] = "done"
            lines.append(Scheduled(begin, now, action.task.name))
