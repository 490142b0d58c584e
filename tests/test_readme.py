"""Run the seven commands of the README as they are written."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from tests.documented import lines_run_by
from tests.forked_commands import ForkedCommand


def test_quickstart_commands_run_unchanged(tmp_path: Path) -> None:
    lines = lines_run_by("tests/test_readme.py")
    assert len(lines) == 7
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    for line in lines:
        result = ForkedCommand(shlex.split(line.text, comments=True), environment, tmp_path).finish()
        assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"
        assert "Next:" in result.stderr, line
        # What torch's exporter warns of is not the reader's concern.
        assert "Warning" not in result.stderr
        assert "torchvision" not in result.stderr
    first = tmp_path / "runs" / "first"
    report = json.loads((first / "report.json").read_text())
    predictions = [json.loads(line) for line in (first / "predictions.jsonl").read_text().splitlines()]
    assert {"R@1 IoU=0.5", "R@5 IoU=0.5", "R@1 IoU=0.7", "mIoU", "queries", "protocol", "prior"} <= set(report)
    assert len(predictions) == report["queries"]
    assert report["R@1 IoU=0.5"] > report["prior"]["R@1 IoU=0.5"], (
        "the model of the README should have learnt something"
    )
    assert (first / "moments.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((first / "drn.int8.parity.json").read_text())["broken"] == []
    assert (first / "curves.png").read_bytes().startswith(b"\x89PNG")
