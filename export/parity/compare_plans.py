"""Check every plan of an engine by itself: an engine of TensorRT may have plans for short queries beside it.

The runtime answers a query with the shortest plan that it fits, so that the plan for long queries answers hardly any of
a data set's. Here each plan answers all queries that it takes, and is compared with the reference like the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from export.parity.parity_result import PlanCheck
from runtime.backends.tensorrt_backend import TensorRTBackend, TensorRTPair
from runtime.backends.tensorrt_model import PlanUse
from runtime.core.batch import Heads
from runtime.grounding.evaluation import Chunk, run_chunk
from runtime.grounding.grounder import Grounder

if TYPE_CHECKING:
    from export.parity.parity_result import ParityResult


class PlanAnswers:
    """Collect the heads of one plan for all queries that it takes.

    Args:
        model: an engine.
        plan: which of its plans.
        gathered: heads of N queries to fill.
    """

    def __init__(self, model: Grounder, plan: PlanUse, gathered: Heads) -> None:
        self.model, self.plan, self.heads = model, plan, gathered
        self._rows: list[np.ndarray] = []

    def ask(self, chunk: Chunk, batch_size: int) -> None:
        """Ask the plan those queries of a chunk that it takes."""
        backend = answering(self.model)
        assert backend is not None
        fits = [index for index, query in enumerate(chunk.queries) if len(query) <= self.plan.max_query_length]
        if not fits:
            return
        some = Chunk(
            chunk.rows[fits],
            [chunk.queries[index] for index in fits],
            [chunk.segments[index] for index in fits],
            [chunk.names[index] for index in fits],
            [chunk.durations[index] for index in fits],
        )
        with backend.only(self.plan.name):
            for rows, result in run_chunk(self.model, some, batch_size):
                for name, values in vars(result).items():
                    getattr(self.heads, name)[rows] = values
        self._rows.append(some.rows)

    @property
    def rows(self) -> np.ndarray:
        """Positions of the queries that were answered, (C,) int64, ascending."""
        return np.sort(np.concatenate([np.empty(0, np.int64), *self._rows]))


def answering(model: Grounder) -> TensorRTBackend | TensorRTPair | None:
    """Return the engine behind a model; None where none is."""
    backend = model.backend
    return backend if isinstance(backend, (TensorRTBackend, TensorRTPair)) else None


def plan_uses(model: Grounder) -> list[PlanUse]:
    """Return the plans of a model and how many queries each has answered so far; none of a model that is no engine."""
    backend = answering(model)
    return backend.plan_uses() if backend else []


def plan_checks(
    before: Sequence[PlanUse],
    after: Mapping[str, int],
    alone: Sequence[PlanAnswers],
    judge: Callable[[Heads, np.ndarray], ParityResult],
) -> tuple[PlanCheck, ...]:
    """Return how each plan answers.

    Args:
        before: the plans, with the queries that each had answered before the engine was asked.
        after: plan to the number of queries that it answered for the engine.
        alone: the answers of each plan by itself; none if there is one plan.
        judge: returns the parity of heads of N queries at some positions.
    """
    answers = {result.plan.name: result for result in alone}
    checks = []
    for plan in before:
        answered = after[plan.name]
        rows = answers[plan.name].rows if plan.name in answers else None
        parity = judge(answers[plan.name].heads, rows) if rows is not None and len(rows) else None
        checked = answered if rows is None else len(rows)
        checks.append(PlanCheck(plan.name, plan.max_query_length, answered, checked, parity))
    return tuple(checks)
