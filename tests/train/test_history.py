"""Test `train.history`: damaged lines are rejected."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runtime.core.errors import CheckpointError
from tests.raising import raises
from train.history import read_history


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        ('{"stage": 1, "epo', "invalid_json"),
        ("[]", "invalid_history"),
        ('{"stage": 1, "epoch": "x"}', "invalid_history"),
        ("\ufffd\ud800", "not_utf8"),
    ],
)
def test_damaged_history_is_rejected_with_line_number(tmp_path: Path, damage: str, code: str) -> None:
    losses = {f"loss_{name}": 0.5 for name in ("matching", "boundary", "iou")}
    path = tmp_path / "history.jsonl"
    record = json.dumps({"stage": 1, "epoch": 1, **losses})
    path.write_text(f"{record}\n\n", encoding="utf-8")
    assert read_history(path) == [json.loads(record)]
    path.write_bytes(f"{record}\n{damage}\n".encode("utf-8", "surrogatepass"))
    with raises(CheckpointError, code, path, "line 2"):
        read_history(path)
