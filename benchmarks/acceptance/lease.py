"""Decide what to run next on a GPU machine that is available for minutes only.

The decision is a function of values: the time used, the packages that have arrived, the tasks that have ended.
`benchmarks.gpu_lease` collects these values and carries the decisions out.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Literal

Plan = Literal["A", "B"]
# done: all steps have a result; failed: no usable result; cut off: the call ended first, and another try may follow.
Outcome = Literal["done", "failed", "cut off"]
TENSORRT, ORT_GPU = "tensorrt", "onnxruntime-gpu"

# Time that is reserved for ending a process and writing the report.
CLOSING_S = 20.0
# A task that is cut off this many times is not started again.
MAX_TRIES = 2
# A machine takes about this long to start.
START_S = 35.0
# Bringing one chunk took 5 s on the first machine of this kind; assumed where no call has been measured yet.
TRANSFER_S = 8.0
# Two calls of more than this each: the chunks of TensorRT would use up the lease.
SLOW_TRANSFER_S = 35.0
UNPACK_S, VERIFY_S = 3.0, 5.0


@dataclasses.dataclass(frozen=True)
class Task:
    """One process of the lease.

    Attributes:
        name: unique.
        expected_s: the task is started only if this many seconds are left.
        max_s: it is ended after this many seconds; then it counts as failed.
        leg: the leg of `benchmarks.gpu` that it runs; empty for the tasks of the lease itself.
        steps: the steps of that leg; all of them if empty.
        after: tasks that must be done before.
        library: the library that it needs, besides what is always there; "" for none.
        background: whether it runs beside the tasks that do not wait for it.
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

# In order of value. Chunks of a library are unpacked before its first task.
TASKS: dict[Plan, tuple[Task, ...]] = {
    "A": (
        WHEELS, PREPARE, CUDA, BUILDER, ENGINE, BAR, SPEED, DELIVERY, INT8, DEFAULTS, ORT, FAULTS, ANSWERS, LOSSES,
        PROFILE, COMPILE, OTHERS,
    ),
    "B": (WHEELS, PREPARE, CUDA, ANSWERS, SPEED, LOSSES, DELIVERY, PROFILE, ORT, COMPILE),
}  # fmt: skip
# Without these plan A has no result that plan B would not have.
ESSENTIAL = (BUILDER, ENGINE, BAR)
# For which library each plan waits for chunks.
CHUNKED: dict[Plan, str] = {"A": TENSORRT, "B": ORT_GPU}


@dataclasses.dataclass(frozen=True)
class Chunks:
    """How far a library that comes in chunks has come.

    Attributes:
        waiting: names of chunks that are here and not unpacked.
        missing: names of chunks that have not arrived.
        verified: whether all files of the library are whole.
        failed: why the library cannot be used; empty while it can.
    """

    waiting: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    verified: bool = False
    failed: str = ""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Seconds of the lease and of one call, both from their beginning."""

    lease_s: float = 13 * 60.0
    call_s: float = 9.5 * 60.0


@dataclasses.dataclass(frozen=True)
class Situation:
    """What a decision depends on.

    Attributes:
        used_s: seconds of the lease that are used up.
        call_used_s: seconds of this call that are used up.
        outcomes: of the tasks that have ended.
        tries: how often each task was started.
        running: background tasks that run.
        importable: libraries that can be imported without chunks.
        chunks: libraries that come in chunks.
        transfers_s: seconds between the end of each earlier call and the beginning of the next.
        more: whether later calls bring more chunks.
        plan_b: why plan B was chosen in an earlier decision; empty while plan A is followed.
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
    """What to do next: one of the subclasses."""


@dataclasses.dataclass(frozen=True)
class Start(Action):
    """Start a task; it must be ended after `limit_s`."""

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
    """Wait for a background task, and decide again when it ends or a second has passed."""

    task: str


@dataclasses.dataclass(frozen=True)
class Stop(Action):
    """End this call.

    Attributes:
        reason: why, for people.
        bring: chunks to bring with the next call, as library/chunk.
        again: whether another call would go on.
    """

    reason: str
    bring: tuple[str, ...] = ()
    again: bool = False


@dataclasses.dataclass(frozen=True)
class Decision:
    """What to do next, and under which plan; `plan_b` is why plan A is given up, or empty."""

    action: Action
    plan: Plan
    plan_b: str


def decide(seen: Situation, limits: Limits) -> Decision:
    """Return what to do next.

    No task is started unless its expected time fits the lease and the call, with time left for closing.
    """
    plan_b = seen.plan_b or _why_plan_b(seen, limits)
    plan: Plan = "B" if plan_b else "A"
    return Decision(_next_action(seen, limits, plan), plan, plan_b)


def lease_left_s(seen: Situation, limits: Limits) -> float:
    """Return the seconds of the lease that tasks may still use."""
    return limits.lease_s - CLOSING_S - seen.used_s


def left_s(seen: Situation, limits: Limits) -> float:
    """Return the seconds that tasks may use in this call."""
    return min(lease_left_s(seen, limits), limits.call_s - CLOSING_S - seen.call_used_s)


def _why_plan_b(seen: Situation, limits: Limits) -> str:
    """Return why TensorRT is given up, or an empty string."""
    if seen.outcomes.get(BUILDER.name) == "failed":
        return "TensorRT was imported without success or made no builder"
    if TENSORRT in seen.importable:
        return ""
    chunks = seen.chunks.get(TENSORRT)
    if chunks is None:
        return "TensorRT cannot be imported and no chunks of it were brought"
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
            f"TensorRT would be ready in {ready:.0f} s and its first engine takes {essential:.0f} s, "
            f"and {max(left, 0):.0f} s are left"
        )
    return ""


def _next_action(seen: Situation, limits: Limits, plan: Plan) -> Action:
    waits_for, later = "", False
    for task in TASKS[plan]:
        if _has_ended(task, seen) or task.name in seen.running or _is_lost(task, seen, plan):
            continue
        if task.library and not _is_usable(task.library, seen):
            action = _fetch(task, seen, limits) if task.library == CHUNKED[plan] else None
            # Under plan B what waits for the background is worth more than a library that has not arrived.
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
        # A background task lives on when the call ends.
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
    """Return whether a task can never start, since one that it needs has ended without success."""
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
    """Return what brings the library of a task nearer; None if it cannot come in time."""
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
    """One line of a schedule: seconds from the beginning of the lease."""

    begin_s: float
    end_s: float
    what: str


def schedule(
    limits: Limits, chunks: Sequence[str], transfer_s: float = TRANSFER_S, before_s: float = START_S
) -> tuple[list[Scheduled], str]:
    """Return what would happen if every task took its expected time, and why plan B was chosen, if it was.

    Args:
        limits: of the lease.
        chunks: names of the chunks of TensorRT; the last is brought with the first call.
        transfer_s: seconds that each later call takes to arrive.
        before_s: seconds of the lease before the first call begins.
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
