"""Test `train.training.run_config`: options round-trip through YAML, and damaged files are rejected."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml", reason="reads run.yaml")

from runtime.core.cli import command  # noqa: E402
from runtime.core.errors import DeviceError, GroundingError  # noqa: E402
from tests.raising import raises  # noqa: E402
from tests.train.conftest import TINY_SIZES  # noqa: E402
from train.__main__ import train  # noqa: E402
from train.training.run_config import with_config  # noqa: E402


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "options.yaml"
    path.write_text("seed: 5\nepochs: [3, 2, 1]\nlr: 1e-05\nblind: true\nfaithful: false\nglove: null\nfpn-dim: 16\n")
    return path


def test_with_config_inserts_options_of_the_file(config: Path) -> None:
    expected = ["--seed=5", "--epochs", "3", "2", "1", "--lr=1e-05", "--blind", "--fpn-dim=16"]
    assert with_config(["--data", "d", "--config", str(config)]) == ["--data", "d", *expected]
    assert with_config([f"--config={config}"]) == expected


def test_with_config_flags_override_the_file(config: Path) -> None:
    words = ["--seed=0", "--config", str(config), "--fpn_dim", "8", "--epochs", "1"]
    assert with_config(words) == ["--seed=0", "--fpn_dim", "8", "--epochs", "1", "--lr=1e-05", "--blind"]


def test_with_config_without_file_changes_nothing() -> None:
    words = ["--data", "d", "--lr", "-1", "--epochs", "1", "2"]
    assert with_config(words) == words


@pytest.mark.parametrize(
    ("text", "code", "value"),
    [
        ("seed: [", "invalid_yaml", "YAML"),
        ("- 1", "unexpected_structure", "list"),
        ("", "unexpected_structure", "NoneType"),
        ("sead: 1", "unexpected_structure", "'sead'"),
        ("resume: true", "unexpected_structure", "'resume'"),
        ("seed: {a: 1}", "unexpected_structure", "seed"),
        ("seed: [[1]]", "unexpected_structure", "seed"),
        ("seed: !!int ''", "invalid_yaml", "YAML"),
        ("seed: !!python/object/apply:os.getcwd []", "invalid_yaml", "YAML"),
        ("seed: " + "[" * 5000, "invalid_yaml", "YAML"),
        ("# " + "x" * 70000, "file_too_large", 16384),
        ("a: &a [1]\nb: &b [*a, *a]\nc: [*b, *b]", "invalid_yaml", "aliases"),
    ],
)
def test_unusable_config_is_rejected(tmp_path: Path, text: str, code: str, value: object) -> None:
    (tmp_path / "x.yaml").write_text(text)
    start = time.process_time()
    with raises(GroundingError, code, tmp_path / "x.yaml", value):
        with_config(["--config", str(tmp_path / "x.yaml")])
    assert time.process_time() - start < 5


def test_missing_config_is_rejected(tmp_path: Path) -> None:
    with raises(GroundingError, "missing_file", tmp_path / "none.yaml"):
        with_config(["--config", str(tmp_path / "none.yaml")])


def test_config_without_pyyaml_names_the_extra(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    with raises(DeviceError, "missing_library", "--config", "PyYAML"):
        with_config(["--config", str(config)])


def test_config_from_python_is_rejected(planted: Path, tmp_path: Path, config: Path) -> None:
    with raises(GroundingError, "inapplicable_option", "--config", config):
        train(planted, tmp_path / "run", config=config)


def test_run_repeats_by_config(short_run: Path, planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = yaml.safe_load((short_run / "run.yaml").read_text())
    assert written["data"] == str(planted)
    assert written["epochs"] == list(TINY_SIZES["epochs"])
    arguments = ["--config", str(short_run / "run.yaml"), "--output", str(tmp_path / "run"), "--stage", "1"]
    monkeypatch.setattr(sys, "argv", ["train", *arguments, "--epochs", "1", "--lr", "1e-3"])
    with pytest.raises(SystemExit) as stopped:
        command(train, with_config)
    assert stopped.value.code == 0
    first, second = (json.loads((run / "run.json").read_text()) for run in (short_run, tmp_path / "run"))
    assert second["inputs"] == first["inputs"]
    assert [stage["epochs"] for stage in second["settings"]["stages"]] == [1]
    changed = {name for name in first["settings"] if first["settings"][name] != second["settings"][name]}
    assert changed == {"stages"}
