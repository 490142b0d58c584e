"""Log the metrics of every epoch for `--logger`: as CSV, or for TensorBoard or Weights & Biases."""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from runtime.core.errors import DeviceError
from runtime.core.io.atomic_files import write_text

LoggerKind = Literal["tensorboard", "csv", "wandb"]
Record = Mapping[str, Any]
# Called after every epoch with the records of all epochs of the run so far, as in `history.jsonl`.
MetricLogger = Callable[[Sequence[Record]], None]
CSV_NAME, TENSORBOARD_NAME = "metrics.csv", "tensorboard"
# Package to install, and module to import.
_LIBRARIES = {"tensorboard": ("tensorboard", "torch.utils.tensorboard"), "wandb": ("wandb", "wandb")}


def import_library(kind: LoggerKind | None) -> Any:
    """Return the module that a logger needs, or None.

    Raises:
        DeviceError: the module is not installed.
    """
    if kind not in _LIBRARIES:
        return None
    package, module = _LIBRARIES[kind]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DeviceError(
            f"--logger {kind} needs {package}, which is not installed. Run `pip install {package}`, or pass "
            "--logger csv.",
            code="missing_library",
        ) from error


@contextlib.contextmanager
def metric_logger(kind: LoggerKind | None, output: Path, config: Mapping[str, Any]) -> Iterator[MetricLogger]:
    """Open a logger, and close it at the end of the `with` statement.

    Args:
        kind: the logger, or None for one that does nothing.
        config: settings of the run, for loggers that show them.

    Raises:
        DeviceError: the library of the logger is not installed.
    """
    library = import_library(kind)
    with contextlib.ExitStack() as stack:
        if kind == "csv":
            yield lambda history: _write_csv(output / CSV_NAME, history)
        elif kind == "tensorboard":
            yield _tensorboard_logger(library, output / TENSORBOARD_NAME, stack)
        elif kind == "wandb":
            run = stack.enter_context(
                library.init(project="drn-deploy", group=output.name, dir=str(output), config=dict(config))
            )
            yield lambda history: run.log(_metrics(history[-1]), step=len(history))
        else:
            yield lambda history: None


def _tensorboard_logger(library: Any, directory: Path, stack: contextlib.ExitStack) -> MetricLogger:
    writer: Any = None

    def log(history: Sequence[Record]) -> None:
        nonlocal writer
        if writer is None:
            # TensorBoard hides what an interrupted run logged from this epoch on.
            writer = stack.enter_context(library.SummaryWriter(str(directory), purge_step=len(history)))
        for name, value in _metrics(history[-1]).items():
            writer.add_scalar(name, value, global_step=len(history))
        writer.flush()

    return log


def _metrics(record: Record) -> dict[str, float]:
    """Return the values of a record other than its stage and epoch."""
    return {name: value for name, value in record.items() if name not in ("stage", "epoch")}


def _write_csv(path: Path, history: Sequence[Record]) -> None:
    columns = dict.fromkeys(name for record in history for name in record)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_text(path, text.getvalue())
