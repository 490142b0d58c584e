"""A quantisation plan: which modules stay as they are for the recall budget to hold, and what that was measured on."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib.errors import CalibrationError
from calib.table import CalibrationTable
from runtime.files import read_json, write_json

if TYPE_CHECKING:
    import onnx

FORMAT = "drn-quantization-plan/1"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `calib.restore` found.

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

    def checked(self, model: onnx.ModelProto, table: CalibrationTable, kind: str, source: str = "the graph") -> Plan:
        """Return this plan; CalibrationError if it was made for another graph, table or kind."""
        dataclasses.replace(table, key={**table.key, **self.key}).check(model, source)
        if self.table != table.digest:
            raise CalibrationError(
                f"The plan was made with the calibration table {self.table[:12]}… and {table.digest[:12]}… is given; "
                "use that table, or search again with `python -m calib.restore`."
            )
        if self.kind != kind:
            raise CalibrationError(f"The plan is for {self.kind} and {kind} is asked for; search again with it.")
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON."""
        write_json(path, {"format": FORMAT, **dataclasses.asdict(self), "keep": list(self.keep)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan; CalibrationError if it is none."""
        value = read_json(Path(path), "quantisation plan", CalibrationError)
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise CalibrationError(f"{path} is no quantisation plan; make one with `python -m calib.restore`.")
        try:
            keep = tuple(str(name) for name in value["keep"])
            return cls(keep, str(value["kind"]), str(value["table"]), dict(value["key"]), dict(value["measured"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CalibrationError(
                f"{path} is a damaged quantisation plan ({type(error).__name__}: {error}); search again."
            ) from error
