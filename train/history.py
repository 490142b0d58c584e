"""Read `history.jsonl`, the record of a training run, one epoch a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runtime.core.errors import CheckpointError, excerpt
from runtime.core.io.text_files import is_number, parse_json, read_lines

# Required in every line: the epoch, and the losses that `curves.png` shows.
FIELDS = ("stage", "epoch", "loss_matching", "loss_boundary", "loss_iou")


def read_history(path: Path) -> list[dict[str, Any]]:
    """Return the records of a `history.jsonl`, one per epoch.

    Raises:
        CheckpointError: a line is cut off or lacks a field.
    """
    records = []
    for number, line in enumerate(read_lines(path, "a training history", CheckpointError), 1):
        location = f"{path}, line {number}"
        record = parse_json(line, location, CheckpointError, advice="delete the line")
        if not isinstance(record, dict) or not all(is_number(record.get(name)) for name in FIELDS):
            raise CheckpointError(
                f"{location}: expected {', '.join(FIELDS)}, got {excerpt(record)}. Delete the line.",
                code="invalid_history",
            )
        records.append(record)
    return records
