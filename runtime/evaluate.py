"""`python -m runtime.evaluate`: R@n IoU=m and mIoU of a model on a data set, beside what not looking would score."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from runtime.backends.base import Device
from runtime.core.cli import command, suggest_next_command
from runtime.core.decoding import Protocol
from runtime.core.errors import GroundingError
from runtime.core.io.atomic_files import atomic_write, check_report, write_json
from runtime.core.metrics import Report, format_table, prior_report
from runtime.core.video import Segments
from runtime.datasets.dataset import DataSet, Invalid, one_per_moment
from runtime.grounding.evaluation import evaluate as evaluate_annotations
from runtime.grounding.evaluation import predictions as predictions_of
from runtime.grounding.evaluation import used_fallback
from runtime.grounding.grounder import BATCH_SIZE, Grounder

log = logging.getLogger("drn")

Ablation = Literal["none", "blind", "shuffled"]


def evaluate(
    model: str | Path,
    data: Path,
    *,
    split: str = "test",
    protocol: Protocol | None = None,
    output: Path | None = None,
    predictions: Path | None = None,
    ablation: Ablation = "none",
    invalid: Invalid = "error",
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
    device: Device = "auto",
    threads: int | None = None,
) -> Report:
    """Ground every query of a split and report recall, compared with the best constant moments of the training split.

    Example:
        python -m runtime.evaluate --model drn.onnx --data charades --split test

    Args:
        model: .onnx, .engine or .pt file, or triton://HOST:PORT/MODEL to evaluate the networks that Triton serves.
        data: directory of a data set. docs/formats.md lists the formats.
        split: train, val or test.
        protocol: mmaction2 (soft-NMS, IoU above the threshold) or drn (hard NMS, IoU at least the threshold).
            Default: set by the model.
        output: JSON file to write the report to.
        predictions: JSONL file to write the moments of every query to, in the QVHighlights format.
        ablation: measure how much the results depend on the video: blind replaces the features by zeros, shuffled
            by those of another video.
        invalid: what to do with a moment that ends before it starts or starts after its video (the published
            training split has four): stop, drop it with a warning, or keep it as a query that no prediction can
            hit.
        limit: use only the first N queries.
        batch_size: number of queries per batch; affects only the speed.
        device: auto, cpu or cuda.
        threads: number of CPU threads.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise GroundingError(
            f"--limit and --batch-size must be at least 1, and {limit} and {batch_size} were given.",
            code="invalid_option",
        )
    data_set = DataSet(data)
    check_report(output, model, predictions, *data_set.files)
    check_report(predictions, model, *data_set.files)
    annotations = data_set.annotations(split, invalid)[:limit]
    grounder = Grounder.load(model, device, threads)
    data_set.check_clock(grounder.manifest.features.clock)
    with tqdm(total=len(annotations), desc="answering", unit="query", leave=False, disable=None) as bar:
        evaluation = evaluate_annotations(
            grounder,
            data_set,
            annotations,
            protocol=protocol,
            batch_size=batch_size,
            segments_of=_ablated(grounder, data_set, [a.video for a in annotations], ablation),
            on_progress=bar.update,
        )
    scored = evaluation.report
    name = Path(model).name
    rows = [(name if ablation == "none" else f"{name}, {ablation}", scored)]
    prior = None
    if "train" in data_set.splits:
        training = data_set.annotations("train", invalid="drop", quiet=True)
        learnt = data_set.spans(one_per_moment(training))
        prior = prior_report(learnt, evaluation.truth, scored.protocol, data_set.preset.iou_thresholds)
        rows.append(("prior (constant moments)", prior))
    # Files before words: whoever reads these may have closed the pipe.
    if output:
        content = {
            **scored.to_dict(),
            "prior": prior.to_dict() if prior else None,
            "split": split,
            "ablation": ablation,
        }
        write_json(output, {**content, "simulated_features": data_set.simulated, "model": name})
    if predictions:
        with atomic_write(predictions) as temporary, open(temporary, "w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in predictions_of(evaluation, annotations, data_set))
    print(format_table(rows))
    print(f"{scored.queries} queries of {split}, protocol {scored.protocol}, percent.")
    if whole := used_fallback(next(iter(evaluation.picks.values()))).sum():
        print(f"{whole} of them have no likely location and are answered by the whole video.")
    if data_set.simulated:
        print("Features are simulated: not comparable with published numbers.")
    first = annotations[0]
    words = ("--model", model, "--data", data, "--video", first.video, "--query", first.sentence)
    suggest_next_command("runtime.infer", *words)
    return scored


def _ablated(
    grounder: Grounder, data_set: DataSet, videos: list[str], ablation: Ablation
) -> Callable[[str], Segments] | None:
    """Return how to get a video's segments when not as they are; None for as they are.

    Queries of one video come one after the other, so a few videos are kept.
    """
    if ablation == "none":
        return None
    if ablation == "blind":

        @functools.lru_cache(maxsize=64)
        def blind(name: str) -> Segments:
            segments = grounder.segments(data_set.video(name))
            return Segments(np.zeros_like(segments.features), segments.spans)

        return blind
    names = sorted(set(videos))
    if len(names) < 2:
        raise GroundingError(
            "Shuffling needs at least two videos, and these queries are all about one.", code="too_few_videos"
        )
    # A cycle through a seeded order: every video gets another's features, never its own.
    order = [names[index] for index in np.random.default_rng(0).permutation(len(names))]
    other = dict(zip(order, order[1:] + order[:1]))

    @functools.lru_cache(maxsize=64)
    def shuffled(name: str) -> Segments:
        spans = grounder.segments(data_set.video(name)).spans
        return Segments(grounder.segments(data_set.video(other[name])).features, spans)

    return shuffled


if __name__ == "__main__":
    command(evaluate)
