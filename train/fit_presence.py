"""Fit the score below which no moment is reported: `python -m train.fit_presence`."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import numpy as np
from tqdm import tqdm

from runtime.backends.base import Device
from runtime.core.cli import command, report_written, suggest_next_command
from runtime.core.errors import CheckpointError, GroundingError, check_option
from runtime.core.io.atomic_files import check_writable
from runtime.core.presence import Presence, fit_threshold
from runtime.datasets.dataset import Annotation, DataSet
from runtime.grounding.evaluation import askable_rows
from runtime.grounding.grounder import BATCH_SIZE, Grounder
from runtime.grounding.retrieval import best_scores, draw_videos
from train.backend import open_checkpoint
from train.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from train.training.dataset import split_by_video

log = logging.getLogger("drn")


def fit_presence(
    checkpoint: Path,
    data: Path,
    output: Path,
    *,
    keep: float | None = None,
    mismatched: int = 5,
    held_out: float | None = None,
    seed: int | None = None,
    batch_size: int = BATCH_SIZE,
    device: Device = "auto",
    threads: int | None = None,
) -> Presence:
    """Fit the no-match threshold of a model, and write the checkpoint with it.

    Each query of videos that the network was not trained on is paired with its own video, which is assumed to
    match, and with other videos, which are assumed not to match. The videos are the val split, or the held-out
    training videos if the data set has no val split. Models exported from the checkpoint contain the threshold;
    evaluation never applies it.

    Args:
        checkpoint: drn.pt from `python -m train` or `python -m train.convert`.
        data: directory of the data set that the network was trained on.
        output: checkpoint to write; may be the file of --model, which is then replaced.
        keep: minimum share of the matching pairs to answer, such as 0.95. Default: maximize balanced accuracy, with
            equal weight for matching and mismatched pairs.
        mismatched: number of other videos per query.
        held_out: fraction of the training videos to fit on, even if there is a val split. Default without a val split:
            the videos that the checkpoint records as held out. Scores are higher on videos that the network was trained
            on.
        seed: random seed of the held-out videos and of the mismatched pairs. Default: the seed of the training.
        batch_size: number of pairs per batch; affects only the speed.
        device: device that runs the network; auto selects cuda if it is available.
        threads: number of CPU threads. Default: set by torch.
    """
    for flag, value, minimum in (("--mismatched", mismatched, 1), ("--batch-size", batch_size, 1), ("--seed", seed, 0)):
        check_option(flag, value, minimum)
    data_set = DataSet(data)
    check_writable(output, *data_set.files)
    loaded = load_checkpoint(checkpoint)
    seed = int(loaded.training.get("seed", 0)) if seed is None else seed
    if held_out is None and "val" in data_set.splits:
        annotations, source = data_set.annotations("val", invalid="drop", quiet=True), "of the val split"
    else:
        annotations = _held_out(loaded, data_set, held_out, seed, str(checkpoint))
        source = "held out of the training videos"
    annotations = [annotations[row] for row in askable_rows(loaded.vocabulary, annotations)]
    videos, own = np.unique([annotation.video for annotation in annotations], return_inverse=True)
    names = videos.tolist()
    log.info("Fitting on %d sentences and %d videos %s.", len(annotations), len(names), source)
    requested = draw_videos(own, len(names), mismatched, seed)
    grounder = Grounder(open_checkpoint(checkpoint, device, threads))
    sentences = [annotation.sentence for annotation in annotations]
    with tqdm(total=requested.size, desc="scoring", unit="pair", leave=False, disable=None) as bar:
        scores = best_scores(
            grounder, data_set, sentences, names, requested, batch_size=batch_size, on_progress=bar.update
        )
    presence = fit_threshold(scores[:, 0], scores[:, 1:].ravel(), keep)
    save_checkpoint(output, dataclasses.replace(loaded, presence=presence))
    print(f"{output}: no moment is found {presence}.")
    if data_set.simulated:
        print("The features are simulated: these shares do not apply to real videos.")
    report_written(output)
    suggest_next_command("export.to_onnx", "--model", output, "--output", output.with_suffix(".onnx"))
    return presence


def _held_out(
    loaded: Checkpoint, data_set: DataSet, fraction: float | None, seed: int, source: str
) -> list[Annotation]:
    """Return the annotations of the training videos to fit on."""
    training = loaded.training
    if fraction is None:
        fraction = training.get("held_out")
        if fraction is None:
            raise CheckpointError(
                f"{source} does not record which videos its training held out. Pass --held-out 0.1 to fit on a tenth "
                "of the training videos, although the network may have been trained on them.",
                code="unknown_held_out",
            )
        if training.get("annotations") != data_set.digest("train"):
            raise CheckpointError(
                f"{source} was trained on other data than {data_set.root}, so its held-out videos are unknown. Pass "
                "that data set, or --held-out 0.1 for a tenth of the videos of this one.",
                code="data_mismatch",
            )
    elif not 0 < fraction < 1:
        raise GroundingError(
            f"Expected --held-out between 0 and 1, got {fraction}. Correct the option.", code="invalid_option"
        )
    elif fraction != training.get("held_out"):
        log.warning(
            "The network may have been trained on the videos that the threshold is fitted on; their scores are higher.",
            extra={"code": "unknown_held_out"},
        )
    annotations = data_set.annotations("train", invalid="keep" if training.get("faithful") else "drop", quiet=True)
    return split_by_video(annotations, fraction, seed)[1]


if __name__ == "__main__":
    command(fit_presence)
