"""Define the report of a parity check: the result, the compared files and the limits that are exceeded."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from export.parity.compare_layers import LayerComparison
from export.parity.compare_shapes import ShapeCheck
from export.parity.model_file import ModelFile, provenance
from export.parity.parity_result import AccuracyBudget, ParityResult, unresolved_drops
from export.parity.parity_tables import Table, parity_tables, shapes_table
from runtime.benchmarking.system_info import versions
from runtime.core.cpu_info import cpu


@dataclasses.dataclass(frozen=True)
class ParityReport:
    """The comparison of a model with a reference on the queries of a split.

    Attributes:
        parity: result of the comparison.
        reference, model: the compared files.
        budget: limits of the accuracy drop.
        violations: each limit that the model exceeds, as a clause.
        split: split of the queries.
        command: command that reproduces the comparison.
        layers: comparison of all tensors; None if it was not made.
        engine_precision: `verdict` and `reason` of the precision of an engine; None for other models.
        precision: sentence on the precision of the model, without its full stop; empty if it was not checked.
        speed: speed relative to another model, as `export.build.speed_check.SpeedCheck.to_dict` returns it with its
            `sentence`; None if it was not checked.
        shapes: outputs at the limits of the model's shapes; empty if they were not checked.
        cpu: CPU of this machine, as `runtime.core.cpu_info.cpu` returns it.
        date: day of the comparison, as YYYY-MM-DD.
        versions: versions of Python and the libraries that ran the models.
    """

    parity: ParityResult
    reference: ModelFile
    model: ModelFile
    budget: AccuracyBudget
    violations: Sequence[str]
    split: str
    command: str
    layers: LayerComparison | None = None
    engine_precision: Mapping[str, str] | None = None
    precision: str = ""
    speed: Mapping[str, Any] | None = None
    shapes: Sequence[ShapeCheck] = ()
    cpu: Mapping[str, Any] = dataclasses.field(default_factory=cpu)
    date: str = dataclasses.field(default_factory=lambda: datetime.date.today().isoformat())
    versions: Mapping[str, str] = dataclasses.field(default_factory=versions)

    def sentence(self) -> str:
        """Return the result of the check in one sentence, or two if the accuracy is not proven."""
        models = f"{self.model.path.name} against {self.reference.path.name}"
        if self.violations:
            return f"The accuracy check of {models} failed: {'; '.join(self.violations)}."
        if self.unresolved:
            return f"The accuracy of {models} is not proven. {'. '.join(self.unresolved)}."
        return f"The accuracy check of {models} passed."

    @property
    def unresolved(self) -> list[str]:
        """Return each drop over the budget that may be due to chance; see `unresolved_drops`."""
        return unresolved_drops(self.parity, self.budget)

    @property
    def names(self) -> tuple[str, str]:
        """Return the file names of the reference and the model, or their roles if both names are equal."""
        reference, model = self.reference.path.name, self.model.path.name
        return (reference, model) if reference != model else ("reference", "model")

    def tables(self) -> list[Table]:
        """Return the tables of the report."""
        tables = parity_tables(self.parity, self.names, self.split, self.budget, self.layers)
        return [*tables, *([shapes_table(self.shapes)] if self.shapes else [])]

    def text(self) -> str:
        """Return the tables and notes for a terminal, without `sentence`."""
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
            "broken": list(self.violations),
            "unresolved": self.unresolved,
            "shapes": [dataclasses.asdict(check) for check in self.shapes],
            "layers": self.layers.to_dict() if self.layers else None,
            "engine_precision": dict(self.engine_precision) if self.engine_precision else None,
            "precision": self.precision,
            "speed": dict(self.speed) if self.speed else None,
            "date": self.date,
            "cpu": dict(self.cpu),
            "versions": dict(self.versions),
            "command": self.command,
        }
