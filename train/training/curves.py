"""Plot the training history."""

from __future__ import annotations

from pathlib import Path

from runtime.core.io.atomic_files import atomic_write
from runtime.core.metrics import recall_name
from train.history import read_history


def draw_curves(history: Path, output: Path) -> None:
    """Plot losses and validation scores of all epochs of a `history.jsonl` to a PNG file."""
    from matplotlib.figure import Figure

    records = read_history(history)
    epochs = range(1, len(records) + 1)
    figure = Figure(figsize=(9, 6), layout="constrained")
    losses, scores = figure.subplots(2, sharex=True)
    for name, label in (("matching", "matching (focal)"), ("boundary", "boundary (IoU)"), ("iou", "IoU head")):
        values = [record[f"loss_{name}"] for record in records]
        losses.plot(epochs, values, marker="o", markersize=3, label=label)
    losses.set_ylabel("training loss")
    for name in (recall_name(1, 0.5), recall_name(1, 0.7), "mIoU"):
        points = [(epoch, 100 * record[name]) for epoch, record in zip(epochs, records, strict=True) if name in record]
        if points:
            scores.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    scores.set_ylabel("validation, %")
    scores.set_xlabel("epoch, over all stages")
    previous = None
    for epoch, record in zip(epochs, records, strict=True):
        if record["stage"] != previous:
            for axes in (losses, scores):
                axes.axvline(epoch - 0.5, color="0.7", linewidth=0.8)
            label = f"stage {record['stage']}"
            losses.text(epoch - 0.4, 1.01, label, transform=losses.get_xaxis_transform(), fontsize=8)
            previous = record["stage"]
    for axes in (losses, scores):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    with atomic_write(output) as temporary:
        figure.savefig(temporary, dpi=120)
