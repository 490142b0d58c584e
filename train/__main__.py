"""Train DRN in three stages, from a data set to drn.pt: `python -m train`."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from runtime.core.cli import command, report_many_written, report_written, suggest_next_command
from runtime.core.cpu_info import cpu_name
from runtime.core.errors import GroundingError
from runtime.core.io.atomic_files import check_writable, locked
from runtime.datasets.dataset import DataSet
from train.backend import torch_device
from train.checkpoints import load_checkpoint
from train.network.initialization import initialize_as_authors, load_glove
from train.network.model import DRN
from train.training.curves import draw_curves
from train.training.distributed import init_distributed
from train.training.inputs import (
    NetworkInputs,
    check_enough_queries,
    load_inputs,
    network_inputs,
    run_identity,
    split_annotations,
)
from train.training.metric_loggers import import_library, metric_logger
from train.training.options import TrainingOptions
from train.training.run_config import with_config, write_run_config
from train.training.trainer import TrainingRun, fresh_model, holds_run

log = logging.getLogger("drn")


def train(
    data: Path,
    output: Path,
    *,
    stage: Literal["all", "1", "2", "3"] = "all",
    load: Path | None = None,
    recipe: Literal["mmaction2", "drn"] = "mmaction2",
    epochs: tuple[int, ...] | None = None,
    batch_size: int | None = None,
    lr: tuple[float, ...] | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    resume: bool = False,
    patience: int | None = None,
    config: Path | None = None,
    logger: Literal["tensorboard", "csv", "wandb"] | None = None,
    validate_on: Literal["held-out", "val", "test", "none"] | None = None,
    held_out: float = 0.1,
    glove: Path | None = None,
    cache: Path | None = None,
    num_segments: int | None = None,
    embed_dim: int | None = None,
    hidden_dim: int | None = None,
    fpn_dim: int | None = None,
    iou_target: Literal["near", "all"] = "near",
    negatives: float = 0.0,
    faithful: bool = False,
    blind: bool = False,
) -> Path:
    """Train DRN on a data set in three stages, and write OUTPUT/drn.pt.

    Stage 1 trains matching and boundaries, stage 2 the IoU head, stage 3 everything at a low learning rate. Each
    stage starts from the best checkpoint of the previous one. Validation runs the same code as `runtime.evaluate`.
    For several GPUs or processes: torchrun --nproc-per-node N --no-python drn train ...

    Example:
        python -m train --data charades --output runs/charades

    Args:
        data: directory of a data set. docs/formats.md lists the formats.
        output: directory of the run: stage1/best.pt ..., history.jsonl, curves.png, run.yaml, drn.pt.
        stage: stage to train, or all; 2 and 3 alone need --load.
        load: checkpoint to start from.
        recipe: published settings to use: mmaction2's, or the authors' (drn).
        epochs: epochs of every stage, or one number per stage. Default: set by the recipe.
        batch_size: queries per process and step. Default: set by the recipe.
        lr: learning rate of every stage, or one per stage. Default: set by the recipe.
        seed: random seed of the initial weights, the order of the queries and the held-out videos.
        device: device to train on: auto, cpu or cuda; auto selects cuda if it is available.
        precision: fp32, or automatic mixed precision in fp16 or bf16.
        resume: continue an interrupted run, or extend one with more --epochs. The result equals that of an
            uninterrupted run with the same arguments.
        patience: stop a stage after this number of epochs without a higher validation score. Default: train all
            epochs.
        config: YAML file of options, such as the run.yaml that every run writes to OUTPUT. Flags override it.
        logger: also log the metrics of every epoch: csv to OUTPUT/metrics.csv, tensorboard to OUTPUT/tensorboard,
            wandb to Weights & Biases. Install tensorboard or wandb for these.
        validate_on: queries to select the best epoch with: held-out training videos, the val split, the test split
            (as the published runs do), or none, which takes the last epoch. Default: val, or held-out videos if
            there is no val.
        held_out: fraction of the training videos to hold out for validation.
        glove: initial word vectors: GloVe text file, or the authors' glove_weights.
        cache: directory of the cached pooled features. Default: inside DATA.
        num_segments: number of segments T, a multiple of 4; the level ranges scale with it. Default: set by the
            data set (32; TACoS 128).
        embed_dim: dimension of the word vectors (300).
        hidden_dim: LSTM hidden size per direction (512).
        fpn_dim: channels of the feature pyramid and the heads (512).
        iou_target: locations that train the IoU head: those with IoU above 0.9 (published), or all.
        negatives: number of negative pairs per positive pair: a query with a video that is not its own, in which no
            location matches. The published recipes use none. They train the network to distinguish videos.
        faithful: reproduce probable mistakes of the published code: training rows whose moment ends before it starts;
            batch norm and losses that cover the batch of each process instead of all; and with --recipe drn the clamp
            of the first location only and the gradients that accumulate in stage 2.
        blind: replace all features by zeros, to measure the recall without visual input.

    Returns:
        The path of drn.pt.
    """
    options = TrainingOptions(**locals())
    result = run(options)
    if result.is_main:
        print(result.checkpoint)
        shown = [output / name for name in ("drn.pt", "history.jsonl", "curves.png")]
        report_written(*(path for path in shown if path in result.written))
        report_many_written("other", [path for path in result.written if path not in shown])
        suggest_next_command("export.to_onnx", "--model", result.checkpoint, "--output", output / "drn.onnx")
    return result.checkpoint


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """The outcome of a training run.

    Attributes:
        checkpoint: path of drn.pt.
        is_main: whether this is the main process, which writes files and prints.
        written: files that this process wrote to the directory of the run.
    """

    checkpoint: Path
    is_main: bool
    written: Sequence[Path]


def run(options: TrainingOptions) -> TrainingResult:
    """Train with `options`; see `train`.

    Raises:
        GroundingError: an option, the data set or a checkpoint cannot be used, or the training has diverged.
    """
    options.validate()
    device = torch_device(options.device)
    _check_precision(options, device)
    import_library(options.logger)
    _check_output(options)
    data_set = DataSet(options.data)
    with (
        init_distributed(device) as processes,
        locked(options.output) if processes.is_main else contextlib.nullcontext(),
    ):
        if not processes.is_main:
            log.setLevel(logging.ERROR)
        before = _file_versions(options.output) if processes.is_main else {}
        if processes.count > 1 and device.type == "cuda":
            device = torch.device("cuda", processes.local_rank)
        split = split_annotations(options, data_set)
        if data_set.simulated:
            log.warning(
                "The features of %s are simulated: recall on them is not comparable with published numbers.",
                options.data,
            )
        loaded = load_checkpoint(options.load) if options.load else None
        network = network_inputs(options, data_set, loaded)
        inputs = load_inputs(options, data_set, split, network, processes)
        model = loaded.model() if loaded else _initialized_model(options, network)
        settings = options.settings(processes.count)
        check_enough_queries(inputs, settings)
        training_run = TrainingRun(options.output, settings, inputs, device, processes)
        training_run.open(options.resume, run_identity(options, split, network, inputs))
        if processes.is_main:
            write_run_config(options)
        log.info(
            "Training on %d queries, validating on %d; %d process%s, %s, %s.",
            len(split.training), len(split.validation), processes.count, "" if processes.count == 1 else "es",
            device, options.precision,
        )  # fmt: skip
        logged = options.logger if processes.is_main else None
        try:
            with metric_logger(logged, options.output, dataclasses.asdict(settings)) as training_run.log_metrics:
                checkpoint = training_run.train(model)
        except KeyboardInterrupt:
            log.warning("\nFinished epochs are saved. Repeat the command with --resume to continue after the last one.")
            raise
        if processes.is_main:
            draw_curves(options.output / "history.jsonl", options.output / "curves.png")
        after = _file_versions(options.output) if processes.is_main else {}
    written = [path for path, version in after.items() if before.get(path) != version]
    return TrainingResult(checkpoint, processes.is_main, written)


def _file_versions(directory: Path) -> dict[Path, tuple[int, int]]:
    """Return inode and time of the last change of every file in a directory and its subdirectories."""
    files = {path: path.stat() for path in sorted(directory.rglob("*")) if path.is_file()}
    return {path: (status.st_ino, status.st_mtime_ns) for path, status in files.items()}


def _check_precision(options: TrainingOptions, device: torch.device) -> None:
    """Reject fp16 on a CPU, and log a warning where bf16 is emulated."""
    if device.type != "cpu":
        return
    if options.precision == "fp16":
        raise GroundingError(
            "--precision fp16 needs a CUDA GPU. Pass --precision bf16 or fp32 on a CPU.",
            code="precision_unsupported",
        )
    bf16 = options.precision == "bf16" and torch.backends.mkldnn.is_available()
    if bf16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        log.warning(
            "%s has no instructions for bf16, so torch emulates it and is slower than in fp32. Pass --precision fp32.",
            cpu_name(),
        )


def _check_output(options: TrainingOptions) -> None:
    """Raise OutputError unless the run may be written to --output, before features are pooled, which takes minutes."""
    path = options.output / "run.json"
    if path.is_file() and not options.resume:
        raise holds_run(options.output)
    check_writable(path)


def _initialized_model(options: TrainingOptions, network: NetworkInputs) -> DRN:
    """Return an untrained network, initialized by the recipe, with the word vectors of --glove."""

    def initialize(model: DRN) -> None:
        if options.recipe == "drn":
            initialize_as_authors(model)
        if options.glove:
            load_glove(model, options.glove, network.vocabulary.words)

    return fresh_model(network.config, options.seed, initialize)


if __name__ == "__main__":
    # The processes share the cores; one thread each is also torchrun's default.
    if "WORLD_SIZE" in os.environ and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    command(train, with_config)
