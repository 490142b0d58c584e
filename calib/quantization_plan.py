"""Store the quantization plan: the modules to keep in higher precision, and the table they were measured with."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib.calibration_table import CalibrationTable
from calib.errors import CalibrationError
from runtime.core.errors import excerpt, printable_line
from runtime.core.io.atomic_files import write_json
from runtime.core.io.digests import json_digest
from runtime.core.io.input_files import read_json
from runtime.core.io.text_files import check_format

if TYPE_CHECKING:
    import onnx

FORMAT = "drn-quantization-plan/1"
KINDS = ("int8", "fp8")
_ADVICE = "Make a plan with `python -m calib.restore`."


@dataclasses.dataclass(frozen=True)
class QuantizationPlan:
    """The modules to keep in higher precision, as measured by `calib.restore`.

    Attributes:
        keep: modules that are not quantized.
        kind: int8 or fp8.
        table: digest of the calibration table.
        key: key of the calibration table: graph, weights, samples, method.
        measured: budget, accuracy loss and steps of the search.
    """

    keep: tuple[str, ...]
    kind: str
    table: str
    key: Mapping[str, str]
    measured: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 of the complete plan."""
        return json_digest(dataclasses.asdict(self))

    def checked(
        self, model: onnx.ModelProto, table: CalibrationTable, kind: str, source: str = "the graph"
    ) -> QuantizationPlan:
        """Return this plan if it belongs to a graph, a calibration table and a precision.

        Args:
            model: FP32 graph.
            source: name of the graph, for messages.

        Raises:
            CalibrationError: the plan belongs to another graph, table or precision.
        """
        dataclasses.replace(table, key={**table.key, **self.key}).check(model, source)
        if self.table != table.digest:
            raise CalibrationError(
                f"The plan is of another calibration table: expected {printable_line(self.table[:12])}…, got "
                f"{table.digest[:12]}…. Use that table, or make a plan with `python -m calib.restore`.",
                code="plan_of_another_table",
            )
        if self.kind != kind:
            raise CalibrationError(
                f"The plan is of another precision: expected {kind}, got {self.kind}. {_ADVICE}",
                code="precision_mismatch",
            )
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON."""
        write_json(path, {"format": FORMAT, "digest": self.digest, **dataclasses.asdict(self)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> QuantizationPlan:
        """Read a plan.

        Raises:
            CalibrationError: the file is missing, not a quantization plan, or edited.
        """
        value = read_json(Path(path), "quantization plan", CalibrationError)
        check_format(value, FORMAT, f"{path}", CalibrationError, "make a plan with `python -m calib.restore`")
        try:
            keep, key, measured = value["keep"], value["key"], value["measured"]
            kind, table, digest = value["kind"], value["table"], value["digest"]
        except KeyError as error:
            raise CalibrationError(
                f"{path} is a damaged quantization plan without {error}. {_ADVICE}", code="missing_field"
            ) from None
        valid = all(isinstance(field, dict) for field in (key, measured)) and isinstance(keep, list)
        if not valid or not all(isinstance(text, str) for text in (*keep, table, *key.values())) or kind not in KINDS:
            raise CalibrationError(
                f"{path} is a damaged quantization plan: expected a list of modules in 'keep', int8 or fp8 in 'kind', "
                f"hashes in 'table' and 'key', values in 'measured'; got keep = {excerpt(keep)}. {_ADVICE}",
                code="invalid_plan",
            )
        plan = cls(tuple(keep), kind, table, key, measured)
        if plan.digest != digest:
            raise CalibrationError(
                f"The content of {path} does not match its digest, so the file was edited or damaged. {_ADVICE}",
                code="digest_mismatch",
            )
        return plan
