"""A quantisation plan: which modules stay as they are for the recall budget to hold, and what that was measured on."""

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
_AGAIN = "search again with `python -m calib.restore`."


@dataclasses.dataclass(frozen=True)
class QuantizationPlan:
    """The modules to keep in higher precision, as measured by `calib.restore`.

    Attributes:
        keep: modules that are not narrowed.
        kind: int8 or fp8.
        table: digest of the calibration table.
        key: the table's key: graph, weights, samples, method.
        measured: budget, costs and the steps of the search.
    """

    keep: tuple[str, ...]
    kind: str
    table: str
    key: Mapping[str, str]
    measured: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 of all that the plan says."""
        return json_digest(dataclasses.asdict(self))

    def checked(
        self, model: onnx.ModelProto, table: CalibrationTable, kind: str, source: str = "the graph"
    ) -> QuantizationPlan:
        """Return this plan; CalibrationError if it was made for another graph, table or kind."""
        dataclasses.replace(table, key={**table.key, **self.key}).check(model, source)
        if self.table != table.digest:
            raise CalibrationError(
                f"The plan was made with the calibration table {printable_line(self.table[:12])}… and "
                f"{table.digest[:12]}… is given; use that table, or search again with `python -m calib.restore`.",
                code="plan_of_another_table",
            )
        if self.kind != kind:
            raise CalibrationError(
                f"The plan is for {self.kind} and {kind} is asked for; search again with it.", code="precision_mismatch"
            )
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON."""
        write_json(path, {"format": FORMAT, "digest": self.digest, **dataclasses.asdict(self)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> QuantizationPlan:
        """Read a plan; CalibrationError if it is none, or was edited."""
        value = read_json(Path(path), "quantisation plan", CalibrationError)
        check_format(value, FORMAT, f"{path}", CalibrationError, "make a plan with `python -m calib.restore`")
        try:
            keep, key, measured = value["keep"], value["key"], value["measured"]
            kind, table, digest = value["kind"], value["table"], value["digest"]
        except KeyError as error:
            raise CalibrationError(
                f"{path} is a damaged quantisation plan without {error}; {_AGAIN}", code="missing_field"
            ) from None
        if not isinstance(keep, list) or not all(isinstance(name, str) for name in keep):
            raise CalibrationError(
                f"{path} should keep a list of module names, and has {excerpt(keep)}; {_AGAIN}", code="invalid_plan"
            )
        if not isinstance(key, dict) or not isinstance(measured, dict):
            raise CalibrationError(
                f"{path} is a damaged quantisation plan: 'key' and 'measured' should be tables; {_AGAIN}",
                code="invalid_plan",
            )
        if kind not in ("int8", "fp8") or not all(isinstance(text, str) for text in (table, *key.values())):
            raise CalibrationError(
                f"{path} is a damaged quantisation plan: 'kind' should be int8 or fp8, 'table' and what is in 'key' "
                f"hashes; {_AGAIN}",
                code="invalid_plan",
            )
        plan = cls(tuple(keep), kind, table, key, measured)
        if plan.digest != digest:
            raise CalibrationError(
                f"{path} does not hash to its own digest, so it was edited or damaged; {_AGAIN}", code="digest_mismatch"
            )
        return plan
