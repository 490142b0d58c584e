"""Test `python -m runtime.serve`: invalid options and inputs."""

from __future__ import annotations

import importlib.util
import logging
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.serve import serve
from tests.raising import check_error, records

pytest.importorskip("fastapi", reason="the service needs the extra [serve]")


def test_missing_packages_name_the_extra(refused: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else known(name))
    error = refused(serve, "--model", tiny_model)
    check_error(error, "missing_library", "uvicorn", "pip install '.[serve]'")


def test_public_host_requires_api_key(refused: Any, tiny_model: Path) -> None:
    error = refused(serve, "--model", tiny_model, "--host", "0.0.0.0")
    check_error(error, "missing_option", "0.0.0.0", "--api-key")


@pytest.mark.parametrize(
    ("option", "value"),
    [("--port", 70000), ("--batch-size", 0), ("--wait-ms", -1), ("--queue-size", 8), ("--timeout", 0), ("--grace", -1)],
)
def test_invalid_option_is_named(refused: Any, tiny_model: Path, option: str, value: Any) -> None:
    check_error(refused(serve, "--model", tiny_model, option, value), "invalid_option", option, value)


def test_port_in_use_is_named(refused: Any, tiny_model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        error = refused(serve, "--model", tiny_model, "--port", port)
    check_error(error, "address_unavailable", f"127.0.0.1:{port}", "--port")


def test_missing_files_are_named(refused: Any, tiny_model: Path, tmp_path: Path) -> None:
    none, model = tmp_path / "none", ("--model", tiny_model)
    check_error(refused(serve, "--model", tmp_path / "none.onnx"), "missing_file", tmp_path / "none.onnx")
    check_error(refused(serve, *model, "--data", none), "missing_file", none)
    check_error(refused(serve, *model, "--media", none), "missing_file", none, "--media")


def test_serve_rejects_wrong_width_and_reports_missing_files(
    refused: Any, tiny_model: Path, mini: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = mini / "C3D_unit16_overlap0.5_merged"
    files = sorted(directory.iterdir())
    files[0].unlink()
    for file in files[1:]:
        file.unlink()
        np.save(file.with_suffix(".npy"), np.ones((30, 8), np.float32))
    check_error(refused(serve, "--model", tiny_model, "--data", mini), "feature_width_mismatch", 8, 16)
    for file in directory.iterdir():
        file.unlink()
    # The warning comes before the error that ends the command.
    error = refused(serve, "--model", tiny_model, "--data", mini, "--media", tmp_path / "none")
    check_error(error, "missing_file", tmp_path / "none", "--media")
    assert records(caplog, logging.WARNING, mini)
