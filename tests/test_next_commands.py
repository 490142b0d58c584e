"""Follow the "Next:" lines from an exported model to a service."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import Any

import pytest

from runtime.core.cli import suggest_next_command
from tests.contract_recorder import command_function
from tests.next_commands import next_command, split_command
from tests.train.training.narrow import narrow_backbone

__all__ = ["narrow_backbone"]

pytest.importorskip("onnx", reason="onnx writes the graphs that are built")


def test_next_commands_lead_from_export_to_service(
    models: Path,
    planted: Path,
    tmp_path: Path,
    run_command: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pytest.importorskip("fastapi", reason="the service needs the extra [serve]")
    monkeypatch.setattr("runtime.benchmarking.timing.WINDOW_SECONDS", 0.0)
    # The service runs until a signal.
    monkeypatch.setattr(importlib.import_module("runtime.service.server"), "run", lambda *_: None)
    extra: dict[str, list[object]] = {
        # The opset and the query length of `models`, whose traced graph is used again.
        "export.to_onnx": ["--opset", 19, "--max-query-length", 16],
        "runtime.evaluate": ["--output", tmp_path / "r.json", "--predictions", tmp_path / "p.jsonl"],
        "export.build_engine": [
            "--calib-method",
            "minmax",
            "--calib-samples",
            40,
            "--limit",
            40,
            "--max-drop",
            100,
            "--target",
            "onnxruntime",
        ],
        "runtime.benchmark": ["--samples", 2, "--batch", 2, "--output", tmp_path / "b.json"],
    }
    words: list[Any] = ["python", "-m", "export.to_onnx", "--model", models / "drn.pt"]
    words += ["--output", tmp_path / "drn.onnx"]
    seen = []
    while len(seen) < 5:
        module, arguments = split_command(words)
        seen.append(module)
        caplog.clear()
        before = set(tmp_path.iterdir())
        arguments = [str(planted) if word == "DIR" else word for word in arguments]
        with caplog.at_level(logging.INFO, "drn"):
            run_command(command_function(module), *arguments, *extra.get(module, ()))
        messages = [record.getMessage() for record in caplog.records]
        written = {message.removeprefix("Written: ") for message in messages if message.startswith("Written: ")}
        assert written == {str(path) for path in set(tmp_path.iterdir()) - before}
        words = next_command(messages)
    assert seen == ["export.to_onnx", "runtime.evaluate", "export.build_engine", "runtime.benchmark", "runtime.serve"]
    assert split_command(words)[0] == "runtime.ground_corpus"


@pytest.mark.parametrize(
    "words",
    [("runtime.infer", "--modle", "a"), ("runtime.evaluate", "--model", "a"), ("runtime.no_command", "--model", "a")],
)
def test_invalid_next_command_fails_every_test(words: tuple[str, ...]) -> None:
    with pytest.raises(AssertionError):
        suggest_next_command(*words)
