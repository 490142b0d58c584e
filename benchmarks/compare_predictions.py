"""Compare the moments in two prediction files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from runtime.core.cli import command
from runtime.core.errors import CheckFailed, GroundingError


def compare(
    first: Annotated[Path, tyro.conf.Positional],
    second: Annotated[Path, tyro.conf.Positional],
    *,
    tolerance: float = 0.01,
) -> None:
    """Compare two prediction files of `runtime.evaluate --predictions`, query by query and rank by rank.

    Args:
        first: predictions of one model.
        second: predictions of the other model, for the same queries.
        tolerance: maximum difference of the boundaries of a moment, in seconds.

    Raises:
        CheckFailed: a query has another number of moments, or a boundary differs by more.
    """
    rows = [[json.loads(line) for line in path.read_text().splitlines()] for path in (first, second)]
    if [row["qid"] for row in rows[0]] != [row["qid"] for row in rows[1]]:
        raise GroundingError(
            f"{first} and {second} have different queries. Pass predictions of the same split.", code="models_differ"
        )
    counts = differing = 0
    shifts, best_shifts = [], []
    for a, b in zip(*rows, strict=True):
        moments, others = (np.array(row["pred_relevant_windows"]).reshape(-1, 3) for row in (a, b))
        if len(moments) != len(others):
            differing += 1
            continue
        counts += len(moments)
        shift = np.abs(moments[:, :2] - others[:, :2]).max(axis=1)
        shifts.append(shift)
        best_shifts.append(shift[0])
    every, best = np.concatenate(shifts), np.array(best_shifts)
    beyond = sum((shift > tolerance).any() for shift in shifts)
    print(f"{len(rows[0])} queries, {counts} moments; {differing} queries with another number of moments.")
    print(f"boundary shift of the best moment: p99 {np.percentile(best, 99):.1e} s, largest {best.max():.1e} s")
    print(f"boundary shift of all moments:     p99 {np.percentile(every, 99):.1e} s, largest {every.max():.1e} s")
    print(f"{beyond} queries with a moment that moved by more than {tolerance} s (order changed, or another moment).")
    if differing or beyond:
        raise CheckFailed(f"{differing + beyond} of {len(rows[0])} queries have other moments. Compare the models.")


if __name__ == "__main__":
    command(compare)
