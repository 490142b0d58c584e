"""Hold the report of a parity check: the result, the files, the verdict."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from export.parity.compare_layers import LayerComparison
from export.parity.model_file import ModelFile, provenance
from export.parity.parity_result import AccuracyBudget, ParityResult, unresolved_drops
from export.parity.parity_tables import Table, parity_tables
from runtime.core.cpu_info import cpu


@dataclasses.dataclass(frozen=True)
class ParityReport:
    """The comparison of two models on the queries of a split, with its verdict.

    Attributes:
        parity: what was found between the two.
        reference, model: the files.
        budget: what the second is held to.
        broken: the promises that do not hold, a clause each.
        split: where the queries come from.
        command: the command that finds the same again.
        layers: where the two part, if that was looked at.
        engine_precision: of an engine: `verdict` over its precision, and `reason`.
        precision: name of the check of the model's precision, with the real share, where one was made.
        cpu: the CPU of the machine that judged, of `runtime.core.cpu_info.cpu`.
    """

    parity: ParityResult
    reference: ModelFile
    model: ModelFile
    budget: AccuracyBudget
    broken: Sequence[str]
    split: str
    command: str
    layers: LayerComparison | None = None
    engine_precision: Mapping[str, str] | None = None
    precision: str = ""
    cpu: Mapping[str, Any] = dataclasses.field(default_factory=cpu)

    def sentence(self) -> str:
        """Return the verdict."""
        names = self.model.path.name, self.reference.path.name
        if self.broken:
            return f"{names[0]} does not answer as {names[1]}: {'; '.join(self.broken)}."
        if self.unresolved:
            return f"{names[0]} against {names[1]}: accuracy is not proven. {'. '.join(self.unresolved)}."
        return f"{names[0]} answers as {names[1]}: every promise is kept."

    @property
    def unresolved(self) -> list[str]:
        """Drops above the budget that the queries are too few to prove, one clause each."""
        return unresolved_drops(self.parity, self.budget)

    @property
    def names(self) -> tuple[str, str]:
        """File names of the reference and the model, or what they are where both have one name."""
        reference, model = self.reference.path.name, self.model.path.name
        return (reference, model) if reference != model else ("reference", "model")

    def tables(self) -> list[Table]:
        """Return the tables of the report."""
        return parity_tables(self.parity, self.names, self.split, self.budget, self.layers)

    def text(self) -> str:
        """Return all but the verdict, for a terminal."""
        parts = [table.text() for table in self.tables()]
        if self.parity.simulated:
            parts.append("Features are simulated: not comparable with published numbers.")
        parts.append(provenance(self.reference, self.model)[1])
        if self.engine_precision:
            parts.append("Precision of the engine: {verdict} ({reason}).".format_map(self.engine_precision))
        return "\n\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.parity.to_dict(),
            "plans": [
                {**check.to_dict(), **dict(zip(("verdict", "reason"), check.verdict(self.parity.queries, self.budget)))}
                for check in self.parity.plans
            ],
            "reference": self.reference.to_dict(),
            "model": self.model.to_dict(),
            "lineage": provenance(self.reference, self.model)[1],
            "split": self.split,
            "budget": dataclasses.asdict(self.budget),
            "broken": list(self.broken),
            "unresolved": self.unresolved,
            "layers": self.layers.to_dict() if self.layers else None,
            "engine_precision": dict(self.engine_precision) if self.engine_precision else None,
            "precision": self.precision,
            "cpu": dict(self.cpu),
            "command": self.command,
        }
