"""`python -m runtime.evaluate`: compute recall, mIoU and mAP of a model or a prediction file."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from runtime.artifacts.manifest import Manifest
from runtime.artifacts.published_results import PublishedResult, published_result
from runtime.backends import is_address
from runtime.backends.base import Device
from runtime.core.cli import command, report_written, suggest_next_command
from runtime.core.decoding import Protocol
from runtime.core.errors import GroundingError, check_option
from runtime.core.io.atomic_files import atomic_write, check_report, write_json
from runtime.core.metrics import Report, format_table, prior_report
from runtime.core.pooling import Segments
from runtime.datasets.dataset import DataSet, Invalid, one_per_moment
from runtime.datasets.prediction_files import read_predictions, read_truths
from runtime.datasets.schema import Annotation
from runtime.grounding.evaluation import Evaluation, used_fallback
from runtime.grounding.evaluation import evaluate as evaluate_annotations
from runtime.grounding.evaluation import predictions as predictions_of
from runtime.grounding.grounder import BATCH_SIZE, Grounder
from runtime.grounding.prediction_scores import (
    EXIST_THRESHOLD,
    HEADLINE,
    LENGTH_RANGES,
    score_predictions,
    truths_of,
)

Ablation = Literal["none", "blind", "shuffled"]


def evaluate(
    model: str | Path | None,
    data: Path,
    *,
    predictions_from: Path | None = None,
    shared_only: bool = False,
    exist_threshold: float = EXIST_THRESHOLD,
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

    With --predictions-from instead of --model, score a prediction file in the QVHighlights format: recall, mIoU and
    mAP, for all moments and by their length, equal to those of the public evaluator (docs/evaluation.md).

    Example:
        python -m runtime.evaluate --model drn.onnx --data charades --split test

    Args:
        model: .onnx, .engine or .pt file, or triton://HOST:PORT/MODEL for a model served by Triton (docs/triton.md).
        data: directory of a data set. docs/formats.md lists the formats. With --predictions-from also a JSONL file
            with the ground truth in the QVHighlights format.
        predictions_from: JSONL file with predictions in the QVHighlights format, to score instead of a model.
        shared_only: score only the queries that both the predictions and the ground truth contain. Default: queries of
            only one of the two are an error.
        exist_threshold: pred_exist_score below which a query of --predictions-from is rejected.
        split: split of the queries: train, val or test.
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
        device: device that runs the model; auto selects cuda if it is available.
        threads: number of CPU threads. Default: set by the library that runs the model.
    """
    # The fields of `Options` are the parameters of this function.
    options = Options(**locals())
    if model is None or predictions_from is not None or shared_only:
        return _score_file(options)
    result = run(options)
    _print(options, result)
    report_written(output, predictions)
    suggest_next_command(*_next_command(options, result))
    return result.evaluation.report


@dataclasses.dataclass(frozen=True)
class Options:
    """The arguments of `evaluate`."""

    model: str | Path | None
    data: Path
    predictions_from: Path | None
    shared_only: bool
    exist_threshold: float
    split: str
    protocol: Protocol | None
    output: Path | None
    predictions: Path | None
    ablation: Ablation
    invalid: Invalid
    limit: int | None
    batch_size: int
    device: Device
    threads: int | None


def _prediction_file(options: Options) -> Path:
    """Return the file to score; GroundingError without one, or with an option that needs a model."""
    if options.predictions_from is None:
        actual = "neither" if options.model is None else "--shared-only with --model"
        raise GroundingError(
            f"Expected --model or --predictions-from, got {actual}. Pass the model or the predictions to score.",
            code="missing_option",
        )
    if options.model is not None:
        raise GroundingError(
            f"Expected --model or --predictions-from, got both, {options.model} and {options.predictions_from}. "
            "Remove one.",
            code="conflicting_options",
        )
    ablation = None if options.ablation == "none" else options.ablation
    given = {"--protocol": options.protocol, "--predictions": options.predictions, "--ablation": ablation}
    names = ", ".join(name for name, value in given.items() if value is not None)
    if names:
        raise GroundingError(
            f"{names} cannot be used with --predictions-from, which runs no model. Remove these options.",
            code="inapplicable_option",
        )
    return options.predictions_from


def _score_file(options: Options) -> Report:
    """Score a prediction file, write and print the metrics, and return those of all queries."""
    path, data, output = _prediction_file(options), options.data, options.output
    check_option("--limit", options.limit, 1)
    # A score may have any range, but no score is below NaN.
    check_option("--exist-threshold", options.exist_threshold, -math.inf)
    data_set = None if data.is_file() or data.suffix == ".jsonl" else DataSet(data)
    check_report(output, path, *([data] if data_set is None else data_set.files))
    truths = read_truths(data) if data_set is None else truths_of(data_set, options.split, options.invalid)
    scores = score_predictions(
        read_predictions(path),
        truths,
        limit=options.limit,
        shared_only=options.shared_only,
        exist_threshold=options.exist_threshold,
    )
    if output:
        settings = {"predictions": path.name, "data": data.name, "split": None if data_set is None else options.split}
        write_json(output, {**scores.to_dict(), **settings})
    labels = {name: f"{name} ({above:g} to {limit:g} s)" for name, (above, limit) in LENGTH_RANGES.items()}
    rows = [("all", scores.report), *((labels[name], report) for name, report in scores.ranges.items())]
    print(format_table(rows, HEADLINE))
    counts = ", ".join(f"{report.queries} {name}" for name, report in scores.ranges.items())
    source = data.name if data_set is None else options.split
    print(f"{scores.report.queries} queries of {source} ({counts}), percent; IoU at least the threshold.")
    if not math.isnan(scores.multi_moment.values["mR@2"]):
        print(format_table([("several moments", scores.multi_moment)]))
    if scores.rejection:
        print(scores.rejection.sentence())
    report_written(output)
    return scores.report


@dataclasses.dataclass(frozen=True)
class Result:
    """An evaluation with its model and queries, the report of the best constant moments, and the published result."""

    model: str | Path
    manifest: Manifest
    data_set: DataSet
    annotations: Sequence[Annotation]
    evaluation: Evaluation
    prior: Report | None
    published: PublishedResult | None


def run(options: Options) -> Result:
    """Evaluate the model, and write the report and the predictions.

    The caller prints afterwards, because the reader of its output may have closed the pipe.
    """
    assert options.model is not None
    check_option("--limit", options.limit, 1)
    check_option("--batch-size", options.batch_size, 1)
    data_set = DataSet(options.data)
    check_report(options.output, options.model, options.predictions, *data_set.files)
    check_report(options.predictions, options.model, *data_set.files)
    annotations = data_set.annotations(options.split, options.invalid)[: options.limit]
    grounder = Grounder.load(options.model, options.device, options.threads)
    data_set.check_clock(grounder.manifest.features.clock)
    with tqdm(total=len(annotations), desc="answering", unit="query", leave=False, disable=None) as bar:
        evaluation = evaluate_annotations(
            grounder,
            data_set,
            annotations,
            protocol=options.protocol,
            batch_size=options.batch_size,
            segments_of=_ablated(grounder, data_set, [a.video for a in annotations], options.ablation),
            on_progress=bar.update,
        )
    published = published_result(grounder.manifest.sources) if data_set.preset.title == "Charades-STA" else None
    prior = _prior(data_set, evaluation)
    result = Result(options.model, grounder.manifest, data_set, annotations, evaluation, prior, published)
    _write(options, result)
    return result


def _prior(data_set: DataSet, evaluation: Evaluation) -> Report | None:
    """Return the report of the best constant moments of the training split; None without a training split."""
    if "train" not in data_set.splits:
        return None
    training = data_set.annotations("train", invalid="drop", quiet=True)
    spans = data_set.spans(one_per_moment(training))
    return prior_report(spans, evaluation.truth, evaluation.report.protocol, data_set.preset.iou_thresholds)


def _write(options: Options, result: Result) -> None:
    if options.output:
        content = {
            **result.evaluation.report.to_dict(),
            "prior": result.prior.to_dict() if result.prior else None,
            "split": options.split,
            "ablation": options.ablation,
            "simulated_features": result.data_set.simulated,
            "model": Path(result.model).name,
            "published": dataclasses.asdict(result.published) if result.published else None,
        }
        write_json(options.output, content)
    if options.predictions:
        presence = result.manifest.presence
        rows = predictions_of(result.evaluation, result.annotations, result.data_set, presence=presence)
        with atomic_write(options.predictions) as temporary, open(temporary, "w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in rows)


def _next_command(options: Options, result: Result) -> tuple[Any, ...]:
    """Return the command that builds an engine of an FP32 model, or measures the speed of another model."""
    given = ("--model", result.model, "--data", options.data)
    if is_address(result.model):
        first = result.annotations[0]
        return ("runtime.infer", *given, "--video", first.video, "--query", first.sentence)
    if result.manifest.precision == "fp32" and result.manifest.part == "whole":
        # Calibration reads the training split.
        precision = "int8" if "train" in result.data_set.splits else "fp16"
        return ("export.build_engine", *given, "--precision", precision)
    return ("runtime.benchmark", *given)


def _print(options: Options, result: Result) -> None:
    scored, name = result.evaluation.report, Path(result.model).name
    rows = [(name if options.ablation == "none" else f"{name}, {options.ablation}", scored)]
    if result.prior:
        rows.append(("prior (constant moments)", result.prior))
    print(format_table(rows))
    print(f"{scored.queries} queries of {options.split}, protocol {scored.protocol}, percent.")
    if result.published:
        print(result.published.sentence())
    if count := used_fallback(next(iter(result.evaluation.detections.values()))).sum():
        print(f"{count} of them have no location above the threshold; their moment is the complete video.")
    if result.data_set.simulated:
        print("The features are simulated: the results are not comparable with published numbers.")


def _ablated(
    grounder: Grounder, data_set: DataSet, videos: list[str], ablation: Ablation
) -> Callable[[str], Segments] | None:
    """Return a function that gives the ablated segments of a video; None without ablation.

    The queries of a video are consecutive, so that a small cache suffices.
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
            "--ablation shuffled needs queries about at least two videos, got one. Use a larger --limit.",
            code="too_few_videos",
        )
    # In a cyclic order no video gets its own features.
    order = [names[index] for index in np.random.default_rng(0).permutation(len(names))]
    other = dict(zip(order, order[1:] + order[:1]))

    @functools.lru_cache(maxsize=64)
    def shuffled(name: str) -> Segments:
        spans = grounder.segments(data_set.video(name)).spans
        return Segments(grounder.segments(data_set.video(other[name])).features, spans)

    return shuffled


if __name__ == "__main__":
    command(evaluate)
