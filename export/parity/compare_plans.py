"""Compare each plan of an engine with the reference on all queries that the plan accepts.

A TensorRT engine may have further plans for short queries. The runtime routes each query to the shortest plan that
accepts it, so the plan for long queries answers few queries of a data set when the engine is compared.
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
    """Collect the heads of one plan for all queries that it accepts.

    Args:
        model: model whose backend is an engine.
        plan: one of its plans.
        heads: heads of N queries, filled by `run`.
    """

    def __init__(self, model: Grounder, plan: PlanUse, heads: Heads) -> None:
        self.model, self.plan, self.heads = model, plan, heads
        self._rows: list[np.ndarray] = []

    def run(self, chunk: Chunk, batch_size: int) -> None:
        """Run the plan on the queries of a chunk that it accepts."""
        backend = _engine_backend(self.model)
        assert backend is not None
        fits = [index for index, query in enumerate(chunk.queries) if len(query) <= self.plan.max_query_length]
        if not fits:
            return
        accepted = Chunk(
            chunk.rows[fits],
            [chunk.queries[index] for index in fits],
            [chunk.segments[index] for index in fits],
            [chunk.names[index] for index in fits],
            [chunk.durations[index] for index in fits],
        )
        with backend.only(self.plan.name):
            for rows, result in run_chunk(self.model, accepted, batch_size):
                for name, values in vars(result).items():
                    getattr(self.heads, name)[rows] = values
        self._rows.append(accepted.rows)

    @property
    def rows(self) -> np.ndarray:
        """Return the indices of the queries that the plan answered, (C,) int64, ascending."""
        return np.sort(np.concatenate([np.empty(0, np.int64), *self._rows]))


def _engine_backend(model: Grounder) -> TensorRTBackend | TensorRTPair | None:
    """Return the backend of an engine; None for other models."""
    backend = model.backend
    return backend if isinstance(backend, (TensorRTBackend, TensorRTPair)) else None


def plan_uses(model: Grounder) -> list[PlanUse]:
    """Return the plans of an engine, with the number of queries each has answered so far; empty for other models."""
    backend = _engine_backend(model)
    return backend.plan_uses() if backend else []


def plan_checks(
    plans: Sequence[PlanUse],
    answered: Mapping[str, int],
    alone: Sequence[PlanAnswers],
    measure: Callable[[Heads, np.ndarray], ParityResult],
) -> tuple[PlanCheck, ...]:
    """Return the accuracy of each plan.

    Args:
        plans: the plans of the engine.
        answered: number of queries that each plan answered for the engine, by name.
        alone: answers of each plan alone; empty for an engine with one plan.
        measure: compares heads of N queries with the reference at the given rows.
    """
    answers = {result.plan.name: result for result in alone}
    checks = []
    for plan in plans:
        checked, parity = answered[plan.name], None
        if plan.name in answers:
            rows = answers[plan.name].rows
            checked, parity = len(rows), measure(answers[plan.name].heads, rows) if len(rows) else None
        checks.append(PlanCheck(plan.name, plan.max_query_length, answered[plan.name], checked, parity))
    return tuple(checks)
