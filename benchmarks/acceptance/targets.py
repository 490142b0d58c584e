"""Define the performance targets of a GPU and compare measurements with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# Absolute bars apply to these GPUs only.
CLASS = ("H100", "H200", "B200", "B300")


@dataclasses.dataclass(frozen=True)
class Bar:
    """A performance target.

    Attributes:
        name: measured quantity.
        limit: maximum or minimum.
        unit: unit of the quantity and the limit.
        at_most: whether the limit is a maximum.
        absolute: whether it applies to GPUs of `CLASS` only.
    """

    name: str
    limit: float
    unit: str
    at_most: bool = False
    absolute: bool = False

    @property
    def wanted(self) -> str:
        """The target as text."""
        return f"at {'most' if self.at_most else 'least'} {self.limit:,g} {self.unit}"

    def met(self, found: float) -> bool:
        """Return whether a value meets the target; NaN does not."""
        return found <= self.limit if self.at_most else found >= self.limit


P50, P99 = "one query end to end, p50", "one query end to end, p99"
GPU_PART, RATE = "one query, GPU part, p50", "pairs with encoded videos, batch 256"
EAGER, GRAPHS, COMPILED = "against eager PyTorch", "against torch with CUDA graphs", "against torch.compile"
NARROW, DELIVERY = "INT8 and FP8 timed beside FP16", "training batches delivered against those a step consumes"
BARS = {
    bar.name: bar
    for bar in (
        Bar(P50, 0.25, "ms", at_most=True, absolute=True),
        Bar(P99, 0.4, "ms", at_most=True, absolute=True),
        Bar(GPU_PART, 0.12, "ms", at_most=True, absolute=True),
        Bar(RATE, 60_000, "pairs a second", absolute=True),
        Bar(EAGER, 20, "times as fast"),
        Bar(GRAPHS, 2, "times as fast"),
        Bar(COMPILED, 2, "times as fast"),
        Bar(NARROW, 2, "precisions"),
        Bar(DELIVERY, 20, "times as many"),
    )
}
# Start of the name of a baseline to its bar.
BASELINES = {"eager": EAGER, "CUDA graphs": GRAPHS, "torch.compile": COMPILED}
HEADER = ("bar", "wanted", "found", "verdict")
# Unit to format; two decimals for others.
_DIGITS = {"ms": ",.3f", "pairs a second": ",.0f"}


def held(gpu: str, found: Mapping[str, float | None]) -> list[dict[str, Any]]:
    """Compare measurements on a GPU of this name with their bars, as entries for the JSON file."""
    entries = []
    for name, value in found.items():
        bar = BARS[name]
        if bar.absolute and not any(kind in gpu for kind in CLASS):
            verdict = "not judged"
        else:
            verdict = "met" if value is not None and bar.met(value) else "MISSED"
        entries.append({"bar": name, "wanted": bar.wanted, "found": value, "verdict": verdict})
    return entries


def missed(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return a clause for each bar that is missed."""
    return [
        f"{entry['bar']}: {told(entry)} where {entry['wanted']} is the bar"
        for entry in entries
        if entry["verdict"] == "MISSED"
    ]


def told(entry: Mapping[str, Any]) -> str:
    """Return the measured value as text."""
    value, unit = entry["found"], BARS[entry["bar"]].unit
    return f"{value:{_DIGITS.get(unit, ',.2f')}} {unit}" if isinstance(value, (float, int)) else "not known"


def fastest(ratios: Mapping[str, float]) -> dict[str, float]:
    """Return for each bar the ratio to the fastest of its baselines, without those on encoded videos."""
    found: dict[str, float] = {}
    for name, ratio in ratios.items():
        for word, bar in BASELINES.items():
            if name.startswith(word) and "encoded" not in name:
                found[bar] = min(ratio, found.get(bar, ratio))
    return found


def of_two_runs(legs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the ratios to torch baselines of another leg, as ratios of medians.

    TensorRT and torch run in separate legs if no version of Python supports both.
    """
    steps = [step["values"] for leg in legs for step in leg["steps"]]
    ours = [entry["found"] for values in steps for entry in values.get("bars", ()) if entry["bar"] == P50]
    theirs = {
        entry["case"]: entry["p50_ms"]
        for values in steps
        for entry in values.get("timings", ())
        if entry["boundary"] == "end to end" and entry["queries"] == 1
    }
    return fastest({case: found / ours[0] for case, found in theirs.items()}) if ours and ours[0] else {}


def rows(legs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return a row of `HEADER` for every bar, from the steps of all legs."""
    entries = {entry["bar"]: entry for leg in legs for step in leg["steps"] for entry in step["values"].get("bars", ())}
    for name, found in of_two_runs(legs).items():
        verdict = "met" if BARS[name].met(found) else "MISSED"
        entries.setdefault(name, {"bar": name, "found": found, "verdict": f"{verdict}, of two runs"})
    return [
        [name, bar.wanted, told(entries[name]), entries[name]["verdict"]]
        if name in entries
        else [name, bar.wanted, "", "not measured"]
        for name, bar in BARS.items()
    ]
