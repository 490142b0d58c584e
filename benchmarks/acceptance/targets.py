"""Define the performance targets of a GPU and compare measurements with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# Bars in absolute times are for GPUs of this class.
CLASS = ("H100", "H200", "B200", "B300")


@dataclasses.dataclass(frozen=True)
class Bar:
    """One figure that was promised.

    Attributes:
        name: what is measured.
        limit, unit: of it.
        at_most: whether the limit is the most it may be, and not the least.
        absolute: whether it holds for GPUs of `CLASS` alone.
    """

    name: str
    limit: float
    unit: str
    at_most: bool = False
    absolute: bool = False

    @property
    def wanted(self) -> str:
        return f"at {'most' if self.at_most else 'least'} {self.limit:,g} {self.unit}"

    def met(self, found: float) -> bool:
        """What is no number meets nothing."""
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
# By how the names of rivals begin.
RIVALS = {"eager": EAGER, "CUDA graphs": GRAPHS, "torch.compile": COMPILED}
HEADER = ("bar", "wanted", "found", "verdict")
# How figures are written, by unit; ratios and counts to two places.
_DIGITS = {"ms": ",.3f", "pairs a second": ",.0f"}


def held(gpu: str, found: Mapping[str, float | None]) -> list[dict[str, Any]]:
    """Return for each bar that was measured on a GPU of this name what came of it, for the JSON file."""
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
    """Return what was found, as people read it."""
    value, unit = entry["found"], BARS[entry["bar"]].unit
    return f"{value:{_DIGITS.get(unit, ',.2f')}} {unit}" if isinstance(value, (float, int)) else "not known"


def fastest(ratios: Mapping[str, float]) -> dict[str, float]:
    """Return for each bar that a ratio by the name of a rival belongs to that of the fastest rival, the smallest.

    Those count that run the whole network, as people do; encoded videos are ours, and stand beside.
    """
    found: dict[str, float] = {}
    for name, ratio in ratios.items():
        for word, bar in RIVALS.items():
            if name.startswith(word) and "encoded" not in name:
                found[bar] = min(ratio, found.get(bar, ratio))
    return found


def of_two_runs(legs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the ratios to torch where it was timed in another leg, as it is beside a TensorRT for which Python is too
    new that has a torch: median by median, on one machine, but not in turns."""
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
    """Return a row of `HEADER` for every bar there is, from the steps of all legs."""
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
