"""`python -m runtime.serve`: what it refuses to start with."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.serve import serve

pytest.importorskip("fastapi", reason="the service needs drn-deploy[serve]")


def test_without_its_packages_it_says_what_to_install(
    refused: Callable[..., str], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else known(name))
    said = refused(serve, "--model", tiny_model)
    assert "uvicorn cannot be imported; run `pip install 'drn-deploy[serve]'`" in said


def test_beyond_this_machine_it_wants_a_key(refused: Callable[..., str], tiny_model: Path) -> None:
    assert "--api-key" in refused(serve, "--model", tiny_model, "--host", "0.0.0.0")


@pytest.mark.parametrize(
    ("option", "value"),
    [("--port", 70000), ("--batch-size", 0), ("--wait-ms", -1), ("--queue-size", 8), ("--timeout", 0), ("--grace", -1)],
)
def test_an_option_that_cannot_be_is_named(
    refused: Callable[..., str], tiny_model: Path, option: str, value: Any
) -> None:
    assert option in refused(serve, "--model", tiny_model, option, value)


def test_a_port_that_is_taken_is_named(refused: Callable[..., str], tiny_model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port} cannot be listened at" in refused(serve, "--model", tiny_model, "--port", port)


def test_missing_files_are_named(refused: Callable[..., str], tiny_model: Path, tmp_path: Path) -> None:
    assert "does not exist" in refused(serve, "--model", tmp_path / "none.onnx")
    assert "does not exist" in refused(serve, "--model", tiny_model, "--data", tmp_path / "none")
    assert "--media" in refused(serve, "--model", tiny_model, "--media", tmp_path / "none")


def test_features_of_another_width_are_refused_at_the_start_and_missing_ones_told(
    refused: Callable[..., str], tiny_model: Path, mini: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = mini / "C3D_unit16_overlap0.5_merged"
    files = sorted(place.iterdir())
    files[0].unlink()
    for file in files[1:]:
        file.unlink()
        np.save(file.with_suffix(".npy"), np.ones((30, 8), np.float32))
    assert "8 wide and this model takes" in refused(serve, "--model", tiny_model, "--data", mini)
    for file in place.iterdir():
        file.unlink()
    # Told before what ends it here.
    assert "--media" in refused(serve, "--model", tiny_model, "--data", mini, "--media", tmp_path / "none")
    assert "usable features of none of its videos" in caplog.text
