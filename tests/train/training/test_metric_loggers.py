"""Test `train.training.metric_loggers`: CSV, TensorBoard, Weights & Biases, and missing libraries."""

from __future__ import annotations

import csv
import dataclasses
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from runtime.core.errors import DeviceError
from tests.raising import raises
from tests.train.conftest import TrainTiny
from train.__main__ import train
from train.history import read_history
from train.training.metric_loggers import metric_logger

HISTORY = [
    {"stage": 1, "epoch": 1, "loss_matching": 0.5, "mIoU": 0.25},
    {"stage": 1, "epoch": 2, "loss_matching": 0.25},
    {"stage": 2, "epoch": 1, "loss_matching": 0.125, "mIoU": 0.5},
]


@dataclasses.dataclass
class Recorder:
    """A double of torch's `SummaryWriter` and of wandb's `Run`: context managers with these methods.

    Sources: https://docs.pytorch.org/docs/stable/tensorboard.html, https://docs.wandb.ai/ref/python/sdk/classes/run/.
    """

    arguments: dict[str, Any]
    values: list[tuple[str, float, int]] = dataclasses.field(default_factory=list)
    closed: bool = False

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *error: object) -> None:
        self.closed = True

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.values.append((tag, scalar_value, global_step))

    def flush(self) -> None:
        assert not self.closed

    def log(self, data: dict[str, float], step: int) -> None:
        self.values += [(name, value, step) for name, value in data.items()]


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_library_logger_gets_values_and_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    opened: list[Recorder] = []

    def open_recorder(log_dir: str = "", **arguments: Any) -> Recorder:
        opened.append(Recorder({"log_dir": log_dir, **arguments}))
        return opened[-1]

    name, function = {"tensorboard": ("torch.utils.tensorboard", "SummaryWriter"), "wandb": ("wandb", "init")}[kind]
    module = types.ModuleType(name)
    setattr(module, function, open_recorder)
    monkeypatch.setitem(sys.modules, name, module)
    with metric_logger(kind, tmp_path / "run", {"seed": 3}) as log:
        log(HISTORY[:2])
        log(HISTORY)
    (recorder,) = opened
    assert recorder.closed
    assert recorder.values == [("loss_matching", 0.25, 2), ("loss_matching", 0.125, 3), ("mIoU", 0.5, 3)]
    expected = (
        {"log_dir": str(tmp_path / "run" / "tensorboard"), "purge_step": 2}
        if kind == "tensorboard"
        else {"log_dir": "", "project": "drn-deploy", "group": "run", "dir": str(tmp_path / "run"),
              "config": {"seed": 3}}
    )  # fmt: skip
    assert recorder.arguments == expected


def test_tensorboard_files_contain_the_values(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with metric_logger("tensorboard", tmp_path, {}) as log:
        for end in (1, 2, 3):
            log(HISTORY[:end])
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("mIoU")] == [(1, 0.25), (3, 0.5)]


@pytest.mark.parametrize(("kind", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_missing_logger_library_is_named_before_training(
    planted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with raises(DeviceError, "missing_library", "--logger", kind, "csv"):
        train(planted, tmp_path / "run", logger=kind)
    assert not (tmp_path / "run").exists()


def test_logged_csv_equals_history(train_tiny: TrainTiny, tmp_path: Path) -> None:
    train_tiny(tmp_path, stage="1", logger="csv", epochs=(2,), lr=(1e-3,))
    history = read_history(tmp_path / "history.jsonl")
    with open(tmp_path / "metrics.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [{name: float(value) for name, value in row.items()} for row in rows] == history
    # An epoch without validation has empty cells.
    with metric_logger("csv", tmp_path, {}) as log:
        for end in (1, 2, 3):
            log(HISTORY[:end])
    with open(tmp_path / "metrics.csv", newline="") as stream:
        assert [row["mIoU"] for row in csv.DictReader(stream)] == ["0.25", "", "0.5"]
