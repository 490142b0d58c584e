"""Check the options of a training run, and derive the settings that determine its weights."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Literal

from runtime.core.errors import CheckpointError, GroundingError
from train.network.losses import LossOptions
from train.training.metric_loggers import LoggerKind
from train.training.recipes import RECIPES, Recipe, Stage

MAX_NEGATIVES = 100
MAX_SIZE = 1 << 16


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """Everything that determines the weights of a run besides the data. A run resumes only with equal settings.

    Attributes:
        recipe: name of the recipe.
        stages: stages to train, in order.
        batch_size: queries per process and step.
        clip_norm: maximum total gradient norm.
        losses: deviations from the published loss rules.
        precision: fp32, or automatic mixed precision in bf16 or fp16.
        seed: random seed of the initial weights, the order of the queries and the held-out videos.
        faithful: whether mistakes of the published code are reproduced; see `train.__main__`.
        processes: number of training processes.
        synchronised: whether batch norm and losses cover the batches of all processes, or each its own, as published.
        negatives: mismatched pairs per matching pair, in the stages that learn from them.
        patience: number of epochs without a higher validation score after which a stage stops; None for no limit.
    """

    recipe: str
    stages: tuple[Stage, ...]
    batch_size: int
    clip_norm: float
    losses: LossOptions
    precision: Literal["fp32", "bf16", "fp16"]
    seed: int
    faithful: bool
    processes: int
    synchronised: bool
    negatives: float = 0.0
    patience: int | None = None

    @property
    def mismatched(self) -> int:
        """Mismatched pairs per process and step."""
        return round(self.negatives * self.batch_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """The options of `python -m train`; `train.__main__.train` describes each."""

    data: Path
    output: Path
    stage: Literal["all", "1", "2", "3"]
    load: Path | None
    recipe: Literal["mmaction2", "drn"]
    epochs: tuple[int, ...] | None
    batch_size: int | None
    lr: tuple[float, ...] | None
    seed: int
    device: str
    precision: Literal["fp32", "bf16", "fp16"]
    resume: bool
    patience: int | None
    config: Path | None
    logger: LoggerKind | None
    validate_on: Literal["held-out", "val", "test", "none"] | None
    held_out: float
    glove: Path | None
    cache: Path | None
    num_segments: int | None
    embed_dim: int | None
    hidden_dim: int | None
    fpn_dim: int | None
    iou_target: Literal["near", "all"]
    negatives: float
    faithful: bool
    blind: bool

    @property
    def preset(self) -> Recipe:
        """The settings of --recipe."""
        return RECIPES[self.recipe]

    @property
    def queries_per_step(self) -> int:
        """Queries per process and step."""
        return self.batch_size or self.preset.batch_size

    @property
    def sizes(self) -> dict[str, int]:
        """The network sizes that were given; the others are those of --load, or the published ones."""
        names = ("num_segments", "embed_dim", "hidden_dim", "fpn_dim")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages to train.

        Raises:
            GroundingError: --epochs or --lr do not fit the number of stages.
        """
        stages: tuple[Stage, ...] = self.preset.stages
        if self.stage != "all":
            stages = (stages[int(self.stage) - 1],)
        for flag, values in (("--epochs", self.epochs), ("--lr", self.lr)):
            fits = values is None or (len(values) in (1, len(stages)) and all(0 < v < math.inf for v in values))
            if not fits:
                raise GroundingError(
                    f"Expected {flag} to be one positive number, or one for each of the {len(stages)} stages, got "
                    f"{values}. Correct the option.",
                    code="invalid_option",
                )
        changes = []
        for index, stage in enumerate(stages):
            epochs = self.epochs[index % len(self.epochs)] if self.epochs else stage.epochs
            rate = self.lr[index % len(self.lr)] if self.lr else stage.learning_rate
            changes.append(dataclasses.replace(stage, epochs=epochs, learning_rate=rate))
        return tuple(changes)

    def settings(self, processes: int) -> TrainingSettings:
        """Return the settings of a run with this number of processes."""
        clip: Literal["all", "first"] = "first" if self.faithful and self.recipe == "drn" else "all"
        return TrainingSettings(
            recipe=self.recipe,
            stages=self.stages,
            batch_size=self.queries_per_step,
            clip_norm=self.preset.clip_norm,
            losses=LossOptions(self.iou_target, clip),
            precision=self.precision,
            seed=self.seed,
            faithful=self.faithful,
            processes=processes,
            synchronised=not self.faithful,
            negatives=self.negatives,
            patience=self.patience,
        )

    def validate(self) -> None:
        """Check the options before any file is read.

        Raises:
            GroundingError: an option is out of range, or conflicts with another.
            CheckpointError: --load is missing for stage 2 or 3.
        """
        first = self.stages[0].number
        if first > 1 and self.load is None:
            raise CheckpointError(
                f"Stage {first} starts from a trained network. Pass --load {self.output}/stage{first - 1}/best.pt "
                "or another checkpoint, or --stage all.",
                code="missing_option",
            )
        if self.glove and self.load:
            raise GroundingError(
                "--glove conflicts with --load, whose network has its own word vectors. Remove one option.",
                code="conflicting_options",
            )
        if self.patience is not None and self.validate_on == "none":
            raise GroundingError(
                "--patience needs validation scores, and conflicts with --validate-on none. Remove one option.",
                code="conflicting_options",
            )
        if self.config is not None:
            raise GroundingError(
                f"--config {self.config} is read by the command only. From Python, pass its options as arguments.",
                code="inapplicable_option",
            )
        self._validate_numbers()

    def _validate_numbers(self) -> None:
        batch_size, negatives = self.queries_per_step, self.negatives
        fits = 0 <= negatives <= MAX_NEGATIVES and (not negatives or round(negatives * batch_size) > 0)
        checks: list[tuple[str, object, bool, str]] = [
            ("--held-out", self.held_out, 0 < self.held_out < 1, "a fraction between 0 and 1"),
            ("--batch-size", self.batch_size, self.batch_size is None or self.batch_size > 0, "at least 1"),
            ("--seed", self.seed, 0 <= self.seed < 2**63, "at least 0 and below 2**63"),
            ("--patience", self.patience, self.patience is None or self.patience > 0, "at least 1"),
            ("--negatives", f"{negatives:g}", fits, f"0 to {MAX_NEGATIVES}, and no less than 1 / {batch_size}"),
        ]
        for name, size in self.sizes.items():
            multiple = {"num_segments": 4, "fpn_dim": 2}.get(name, 1)
            in_range = 1 <= size <= MAX_SIZE and size % multiple == 0
            expected = f"a multiple of {multiple} " if multiple > 1 else ""
            checks.append((f"--{name.replace('_', '-')}", size, in_range, f"{expected}from 1 to {MAX_SIZE}"))
        for flag, value, valid, expected in checks:
            if not valid:
                raise GroundingError(
                    f"Expected {flag} to be {expected}, got {value}. Correct the option.", code="invalid_option"
                )
