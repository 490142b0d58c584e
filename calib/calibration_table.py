"""Store the calibration table: ranges by tensor, and the graph, weights and samples that they were measured on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib.errors import CalibrationError
from calib.graph.channel_equalization import LARGEST_EXPONENT, ChannelScales
from calib.graph.gate_normalization import NORMALIZED_TENSORS
from calib.graph.onnx_graph import graph_hash, weights_hash
from calib.range_estimation import METHODS, ValueRange
from runtime.core.errors import excerpt, one_line, printable_line
from runtime.core.io.atomic_files import write_text
from runtime.core.io.digests import json_digest
from runtime.core.io.input_files import read_json
from runtime.core.io.text_files import check_format, is_number
from runtime.datasets.dataset import DataSet

if TYPE_CHECKING:
    import onnx

log = logging.getLogger("drn")

FORMAT = "drn-calibration/1"
SUFFIX = ".calibration.json"
KEYS = ("graph", "weights", "samples", "method", "split")


@dataclasses.dataclass(frozen=True)
class CalibrationTable:
    """Ranges by tensor name.

    Attributes:
        ranges: tensor name to its range; values outside are clipped.
        key: `graph` and `weights` hashes of the FP32 model, `samples` digest, `method`, `split`.
        videos: calibration videos, sorted.
        coverage: distribution of the calibration queries.
        choice: how `auto` chose the method, with the loss of each candidate; empty for a fixed method.
        gains: tensor name to the exponent of two of each channel. The range of the tensor is measured after channel
            equalization (`calib.graph.channel_equalization`).
    """

    ranges: Mapping[str, ValueRange]
    key: Mapping[str, str]
    videos: tuple[str, ...] = ()
    coverage: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    choice: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    gains: ChannelScales = dataclasses.field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 of what a quantized graph depends on: key, ranges and gains."""
        content = {"key": dict(self.key), "ranges": _rows(self.ranges), "gains": _lists(self.gains)}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def content_digest(self) -> str:
        """SHA-256 of the complete table."""
        content = {"ranges": _rows(self.ranges), "gains": _lists(self.gains), "videos": self.videos}
        return json_digest({**content, **{name: dict(getattr(self, name)) for name in ("key", "coverage", "choice")}})

    def check(self, model: onnx.ModelProto, source: str = "the graph") -> None:
        """Raise CalibrationError unless the ranges were measured on this model; `source` names it in the message."""
        for part, actual in (("graph", graph_hash(model)), ("weights", weights_hash(model))):
            expected = self.key[part]
            if expected != actual:
                raise CalibrationError(
                    f"The calibration table is of another model: expected the hash {printable_line(expected[:12])}… of "
                    f"the {part}, got {actual[:12]}… from {source}. Calibrate with "
                    f"`python -m calib.calibrate --model {source} --data DIR --output TABLE`.",
                    code="table_of_another_model",
                )

    def check_videos(self, data_set: DataSet) -> None:
        """Raise CalibrationError if the table was measured on videos of the test split of a data set."""
        from calib.calibration_set import forbid_test_videos

        forbid_test_videos(data_set, self.videos, "The calibration table")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as JSON with one line per tensor."""
        value = {
            "format": FORMAT,
            "key": dict(self.key),
            "digest": self.digest,
            "content_digest": self.content_digest,
            "choice": dict(self.choice),
            "coverage": dict(self.coverage),
            "videos": "@videos",
            "ranges": "@ranges",
            "gains": "@gains",
        }
        rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in _rows(self.ranges).items())
        gains = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in _lists(self.gains).items())
        text = json.dumps(value, indent=2, allow_nan=False)
        text = text.replace('"@videos"', json.dumps(list(self.videos)), 1).replace('"@ranges"', f"{{\n{rows}\n  }}", 1)
        write_text(path, text.replace('"@gains"', f"{{\n{gains}\n  }}", 1) + "\n")

    @classmethod
    def _from_dict(cls, value: Mapping[str, Any]) -> CalibrationTable:
        """Read the content of a file; KeyError, TypeError or ValueError if it is damaged."""
        return cls(
            {name: _range(row) for name, row in value["ranges"].items()},
            {name: _text(value["key"][name]) for name in KEYS},
            tuple(_text(video) for video in _list(value["videos"])),
            dict(value["coverage"].items()),
            dict(value["choice"].items()),
            {name: tuple(_exponent(shift) for shift in _list(row)) for name, row in value["gains"].items()},
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CalibrationTable:
        """Read a table.

        Raises:
            CalibrationError: the file is missing, not a calibration table, edited, or not of a training split.
        """
        path = Path(path)
        value = read_json(path, "calibration table", CalibrationError)
        check_format(value, FORMAT, f"{path}", CalibrationError, "make a table with `python -m calib.calibrate`")
        try:
            table = cls._from_dict(value)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CalibrationError(
                f"{path} is a damaged calibration table ({type(error).__name__}: {one_line(error)}). Calibrate again.",
                code="invalid_table",
            ) from error
        ranges, key = table.ranges, table.key
        if not ranges or any(not -math.inf < entry.low <= entry.high < math.inf for entry in ranges.values()):
            raise CalibrationError(
                f"{path} has no range, or one whose ends are not finite or not in ascending order. Calibrate again.",
                code="invalid_range",
            )
        # Tables of version 0.1 have no content_digest.
        intact = value.get("content_digest", table.content_digest) == table.content_digest
        if key["method"] not in METHODS or table.digest != value.get("digest") or not intact:
            raise CalibrationError(
                f"The content of {path} does not match its digest, so the file was edited or damaged. Calibrate again.",
                code="digest_mismatch",
            )
        if key["split"] != "train":
            raise CalibrationError(
                f"Expected ranges of the split 'train', got {excerpt(key['split'])} in {path}. Calibrate with "
                "`python -m calib.calibrate`.",
                code="test_videos_used",
            )
        if not NORMALIZED_TENSORS & set(ranges):
            log.warning(
                "%s has constant scales for gated features, as in version 0.1. Calibrate again: scales per query lose "
                "less accuracy.",
                path,
            )
        return table


def _number(value: Any) -> float:
    if not is_number(value):
        raise TypeError(f"expected a number, got {excerpt(value)}")
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {excerpt(value)}")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"expected a list, got {excerpt(value)}")
    return value


def _range(value: Any) -> ValueRange:
    if len(_list(value)) != 2:
        raise ValueError(f"expected a lower and an upper end, got {excerpt(value)}")
    return ValueRange(_number(value[0]), _number(value[1]))


def _exponent(value: Any) -> int:
    if type(value) is not int or abs(value) > LARGEST_EXPONENT:
        raise ValueError(f"expected an integer of at most {LARGEST_EXPONENT} in magnitude, got {excerpt(value)}")
    return value


def calibration_key(model: onnx.ModelProto, samples: str, method: str) -> dict[str, str]:
    """Return the key of a calibration table: hashes of graph and weights, samples, method and split.

    Args:
        model: FP32 graph that the table is measured on.
        samples: digest of the calibration set.
        method: calibration method, a name of `METHODS`.
    """
    return {
        "graph": graph_hash(model),
        "weights": weights_hash(model),
        "samples": samples,
        "method": method,
        "split": "train",
    }


def _lists(gains: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    return {name: list(row) for name, row in gains.items()}


def _rows(ranges: Mapping[str, ValueRange]) -> dict[str, list[float]]:
    return {name: [entry.low, entry.high] for name, entry in ranges.items()}
