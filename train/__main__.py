"""`python -m train`: three stages, from a data set to drn.pt."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
from pathlib import Path
from typing import Literal

import torch

from runtime.core.cli import command, next_command
from runtime.core.decoding import Decoding
from runtime.core.errors import CheckpointError, GroundingError, OutputError
from runtime.core.io.files import check_writable, locked
from runtime.datasets.dataset import DataSet, each_moment
from runtime.datasets.presets import length_quantiles
from runtime.grounding.evaluation import askable_rows
from train.backend import torch_device
from train.checkpoints import Checkpoint, load_checkpoint, source_hash
from train.network.initialization import initialise_as_authors, load_glove
from train.network.model import DRN, DRNConfig
from train.training.curves import draw_curves
from train.training.dataset import TrainingData, encode, pool, split_by_video, windows_of
from train.training.distributed import started_by_torchrun
from train.training.recipes import RECIPES, Stage
from train.training.trainer import Materials, Run, Settings, fresh_model

log = logging.getLogger("drn")

MOST_NEGATIVES = 100


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
    """Train DRN on a data set, in three stages, and write OUTPUT/drn.pt.

    Stage 1 learns to match and to find boundaries, stage 2 to judge proposals, stage 3 both at a small rate; each
    starts from the best checkpoint of the one before. Validation asks the model as `runtime.evaluate` does. For
    several GPUs or processes: torchrun --nproc-per-node N -m train ...

    Args:
        data: directory of a data set; docs/formats.md lists the formats.
        output: directory of the run: stage1/best.pt ..., history.jsonl, curves.png, drn.pt.
        stage: which stage to train; 2 and 3 alone start from --load.
        load: checkpoint to start from.
        recipe: whose published settings: mmaction2, or the authors' (drn).
        epochs: of every stage, or one number for each; the recipe's when not given.
        batch_size: queries per process and step; the recipe's when not given.
        lr: learning rate of every stage, or one for each; the recipe's when not given.
        seed: of initial weights, order and held-out videos.
        device: auto, cpu or cuda.
        precision: fp32, or automatic mixed precision.
        resume: continue a run that was interrupted, or that gets more --epochs; the weights are those of a run that
            was started with the same arguments.
        validate_on: held-out training videos, the val or test split (published runs choose on test), or none (the last
            epoch is kept). The val split when not given, and held-out videos where there is none.
        held_out: fraction of the training videos to validate on.
        glove: word vectors to start from: GloVe text, or the authors' glove_weights.
        cache: where pooled features are kept; inside DATA when not given.
        num_segments: T, a multiple of 4; the data set's when not given (32, TACoS 128). Level ranges grow with it.
        embed_dim: width of word vectors (300).
        hidden_dim: LSTM width per direction (512).
        fpn_dim: width of the pyramid and the head (512).
        iou_target: locations that train the IoU head: those with IoU above 0.9 as published, or all.
        negatives: for each pair of a sentence and its video, so many of a sentence and a video that is not its own, in
            which no location is to match; the published recipes ask none. They teach the network to distinguish videos.
        faithful: keep what looks like slips of the published code: training lines whose moment ends before it starts,
            statistics and divisors per process, and with --recipe drn the clamp of the first location only and the
            gradients that pile up in stage 2.
        blind: replace all features by zeros, to measure what can be learnt without looking.

    Returns:
        The path of drn.pt.
    """
    preset = RECIPES[recipe]
    stages = _stages(preset.stages, stage, epochs, lr)
    if stages[0].number > 1 and load is None:
        raise CheckpointError(
            f"Stage {stages[0].number} starts from a trained network; pass "
            f"--load {output}/stage{stages[0].number - 1}/best.pt (or another checkpoint), or train --stage all.",
            code="missing_option",
        )
    sizes = Sizes(num_segments, embed_dim, hidden_dim, fpn_dim)
    _check(sizes, held_out, batch_size, seed, glove, load)
    _check_negatives(negatives, batch_size or preset.batch_size)
    target = torch_device(device)
    if precision == "fp16" and target.type == "cpu":
        raise GroundingError(
            "Mixed precision in fp16 needs a CUDA GPU; use --precision bf16 or fp32 on a CPU.",
            code="precision_unsupported",
        )

    # Before features are pooled, which takes minutes.
    if (output / "run.json").is_file() and not resume:
        raise OutputError(
            f"{output} holds a training run; pass --resume to go on with it, or choose another --output.",
            code="output_holds_run",
        )
    check_writable(output / "run.json")
    data_set = DataSet(data)
    with (
        started_by_torchrun(target) as processes,
        locked(output) if processes.leads else contextlib.nullcontext(),
    ):
        if not processes.leads:
            log.setLevel(logging.ERROR)
        if processes.count > 1 and target.type == "cuda":
            target = torch.device("cuda", processes.local_rank)
        annotations = data_set.annotations("train", invalid="keep" if faithful else "drop")
        if validate_on is None:
            validate_on = "val" if "val" in data_set.splits else "held-out"
        if validate_on == "held-out":
            training, validation = split_by_video(annotations, held_out, seed)
            # So that a threshold can be fitted on the same videos: `train.fit_presence`.
            told = {"held_out": held_out, "faithful": faithful, "annotations": data_set.digest("train")}
        else:
            training, told = annotations, {}
            validation = [] if validate_on == "none" else data_set.annotations(validate_on, invalid="drop")
        # A sentence with several moments is asked once, and teaches each.
        training = each_moment(training)
        if data_set.simulated:
            log.warning(
                "The features of %s are simulated: recall on them is not comparable with published numbers.",
                data,
            )

        loaded = load_checkpoint(load) if load else None
        vocabulary = loaded.vocabulary if loaded and len(loaded.vocabulary) else data_set.vocabulary
        # A network keeps the pooling that it was trained with.
        pooling = loaded.features.pooling if loaded else preset.pooling
        features = dataclasses.replace(data_set.features(), pooling=pooling)
        if loaded is None and num_segments is None:
            sizes = dataclasses.replace(sizes, num_segments=data_set.preset.num_segments)
        config = _network(sizes, loaded, len(vocabulary), features.dim, f"{data}")
        # Before the first epoch, not after it. A sentence without a known word is a miss in validation.
        encode([validation[row] for row in askable_rows(vocabulary, validation)], vocabulary)
        videos = sorted({annotation.video for annotation in (*training, *validation)})
        cache = cache or Path(data) / "cache"
        # The leader writes the cache, and the others find it.
        pooled = pool(data_set, videos, config.num_segments, features, cache) if processes.leads else None
        processes.wait()
        if pooled is None:
            pooled = pool(data_set, videos, config.num_segments, features, cache)

        def initialise(model: DRN) -> None:
            if preset.initialisation == "drn":
                initialise_as_authors(model)
            if glove:
                load_glove(model, glove, vocabulary.words)

        model = loaded.model() if loaded else fresh_model(config, seed, initialise)
        losses = dataclasses.replace(
            preset.losses, iou_target=iou_target, iou_clip="first" if faithful and recipe == "drn" else "all"
        )
        settings = Settings(
            recipe=recipe,
            stages=stages,
            batch_size=batch_size or preset.batch_size,
            clip_norm=preset.clip_norm,
            losses=losses,
            precision=precision,
            seed=seed,
            faithful=faithful,
            processes=processes.count,
            synchronised=not faithful,
            negatives=negatives,
        )
        learnt = TrainingData(data_set, training, pooled, vocabulary, blind)
        materials = Materials(
            data_set=data_set,
            training=learnt,
            validation=validation,
            vocabulary=vocabulary,
            features=features,
            decoding=Decoding(
                num_segments=config.num_segments,
                strides=config.strides,
                # As published for 32 segments: no level drops a proposal before NMS.
                pre_nms_top_n=max(Decoding.pre_nms_top_n, config.num_segments),
                protocol=preset.protocol,
            ),
            windows=windows_of(data_set, training),
            told={**told, "query_length_quantiles": list(length_quantiles(map(len, learnt.queries)))},
        )
        if negatives and len({annotation.video for annotation in training}) < 2:
            raise GroundingError(
                "--negatives asks other videos, and there is only one; leave it out.", code="too_few_videos"
            )
        if len(training) < settings.batch_size * processes.count:
            raise GroundingError(
                f"{len(training)} queries do not fill one step of {settings.batch_size * processes.count}; "
                "lower --batch-size.",
                code="too_few_queries",
            )
        run = Run(output, settings, materials, target, processes)
        inputs = {
            "network": dataclasses.asdict(config),
            "validate_on": validate_on,
            "held_out": held_out if validate_on == "held-out" else None,
            "queries": [len(training), len(validation)],
            "annotations": [
                data_set.digest(split)
                for split in ("train", *((validate_on,) if validate_on in ("val", "test") else ()))
            ],
            "features": pooled.key,
            "glove": source_hash(glove) if glove else None,
            "load": source_hash(load) if load else None,
            "blind": blind,
        }
        run.open(resume, inputs)
        log.info(
            "Training on %d queries, validating on %d; %d process%s, %s, %s.",
            len(training), len(validation), processes.count, "" if processes.count == 1 else "es", target, precision,
        )  # fmt: skip
        try:
            checkpoint = run.train(model)
        except KeyboardInterrupt:
            log.warning("\nWhat is done is kept: the same command with --resume goes on from the last whole epoch.")
            raise
        if processes.leads:
            draw_curves(output / "history.jsonl", output / "curves.png")
            print(checkpoint)
            next_command("export.to_onnx", "--checkpoint", checkpoint, "--output", output / "drn.onnx")
    return checkpoint


def _stages(
    stages: tuple[Stage, ...], chosen: str, epochs: tuple[int, ...] | None, rates: tuple[float, ...] | None
) -> tuple[Stage, ...]:
    if chosen != "all":
        stages = (stages[int(chosen) - 1],)
    for flag, values in (("--epochs", epochs), ("--lr", rates)):
        if values is not None and (len(values) not in (1, len(stages)) or not all(0 < v < math.inf for v in values)):
            raise GroundingError(
                f"{flag} takes one positive number, or one for each of the {len(stages)} stages, "
                f"and {values} was given.",
                code="invalid_option",
            )
    if epochs:
        counts = epochs * len(stages) if len(epochs) == 1 else epochs
        stages = tuple(dataclasses.replace(s, epochs=count) for s, count in zip(stages, counts, strict=True))
    if rates:
        each = rates * len(stages) if len(rates) == 1 else rates
        stages = tuple(dataclasses.replace(s, learning_rate=rate) for s, rate in zip(stages, each, strict=True))
    return stages


def _check_negatives(negatives: float, batch_size: int) -> None:
    if not 0 <= negatives <= MOST_NEGATIVES or (negatives and not round(negatives * batch_size)):
        raise GroundingError(
            f"--negatives is 0 to {MOST_NEGATIVES} mismatched pairs for each matching one, and, if any, one or more in "
            f"a step of {batch_size}; {negatives:g} was given.",
            code="invalid_option",
        )


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes asked for on the command line; None takes those of --load, or the published ones."""

    num_segments: int | None
    embed_dim: int | None
    hidden_dim: int | None
    fpn_dim: int | None

    def given(self) -> dict[str, int]:
        return {name: size for name, size in vars(self).items() if size is not None}


def _check(
    sizes: Sizes, held_out: float, batch_size: int | None, seed: int, glove: Path | None, load: Path | None
) -> None:
    """Raise what can be known to be wrong before anything is read."""
    if not 0 < held_out < 1:
        raise GroundingError(
            f"--held-out is the fraction of videos to validate on, between 0 and 1, and {held_out} is not.",
            code="invalid_option",
        )
    if batch_size is not None and batch_size < 1:
        raise GroundingError(f"--batch-size must be at least 1, and {batch_size} was given.", code="invalid_option")
    if not 0 <= seed < 2**63:
        raise GroundingError(f"--seed must be 0 or more and below 2**63, and {seed} was given.", code="invalid_option")
    multiples = {"num_segments": 4, "fpn_dim": 2}
    for name, size in sizes.given().items():
        multiple = multiples.get(name, 1)
        if not 1 <= size <= 1 << 16 or size % multiple:
            flag = f"--{name.replace('_', '-')}"
            wanted = "" if multiple == 1 else f"a multiple of {multiple}, and "
            raise GroundingError(
                f"{flag} must be {wanted}from 1 to 65536, and {size} was given.", code="invalid_option"
            )
    if glove and load:
        raise GroundingError(
            "--glove sets the words of a fresh network and --load brings its own; leave one out.",
            code="conflicting_options",
        )


def _network(sizes: Sizes, loaded: Checkpoint | None, words: int, feature_dim: int, data: str) -> DRNConfig:
    """Return the shape of the network: the loaded one, which what was asked for must not contradict, or a fresh one."""
    if loaded is None:
        return DRNConfig(vocab_size=words, feature_dim=feature_dim, **sizes.given())
    for name, size in sizes.given().items():
        if getattr(loaded.config, name) != size:
            raise GroundingError(
                f"--{name.replace('_', '-')} {size} was given and the network of --load has "
                f"{getattr(loaded.config, name)}; leave the flag out.",
                code="conflicting_options",
            )
    if loaded.config.feature_dim != feature_dim:
        raise GroundingError(
            f"The network of --load takes features of width {loaded.config.feature_dim} and {data} holds features of "
            f"width {feature_dim}; use the features it was trained on.",
            code="feature_width_mismatch",
        )
    return loaded.config


if __name__ == "__main__":
    # One OpenMP team per process is torchrun's default; more would fight over the cores.
    if "WORLD_SIZE" in os.environ and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    command(train)
