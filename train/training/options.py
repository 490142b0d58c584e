"""Check the options of a training run, and derive from them the settings that decide its weights."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Literal

from runtime.core.errors import CheckpointError, GroundingError
from train.network.losses import LossOptions
from train.training.recipes import RECIPES, Recipe, Stage

MAX_NEGATIVES = 100
MAX_SIZE = 1 << 16


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """All that decides the weights a run ends with, besides the data. A run resumes only under its own.

    Attributes:
        recipe: name of the preset.
        stages: what to train, in order.
        batch_size: queries per process and step.
        clip_norm: largest total gradient norm.
        losses: where losses follow which rule.
        precision: of the arithmetic: fp32, or automatic mixed precision in bf16 or fp16.
        seed: of the initial weights, the order of queries and the videos held out.
        faithful: whether slips of the published code are kept; see `train.__main__`.
        processes: how many train together.
        synchronised: whether processes act as one with the whole batch, or each with statistics and divisors of its
            own, as published.
        negatives: mismatched pairs for each matching one, in the stages that learn from them.
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
        return RECIPES[self.recipe]

    @property
    def queries_per_step(self) -> int:
        """Queries per process and step."""
        return self.batch_size or self.preset.batch_size

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the network that were given; the others are those of --load, or the published ones."""
        names = ("num_segments", "embed_dim", "hidden_dim", "fpn_dim")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages to train; GroundingError if --epochs or --lr do not fit them."""
        stages: tuple[Stage, ...] = self.preset.stages
        if self.stage != "all":
            stages = (stages[int(self.stage) - 1],)
        for flag, values in (("--epochs", self.epochs), ("--lr", self.lr)):
            fits = values is None or (len(values) in (1, len(stages)) and all(0 < v < math.inf for v in values))
            if not fits:
                raise GroundingError(
                    f"{flag} takes one positive number, or one for each of the {len(stages)} stages, "
                    f"and {values} was given.",
                    code="invalid_option",
                )
        if self.epochs:
            counts = self.epochs * len(stages) if len(self.epochs) == 1 else self.epochs
            stages = tuple(dataclasses.replace(s, epochs=count) for s, count in zip(stages, counts, strict=True))
        if self.lr:
            rates = self.lr * len(stages) if len(self.lr) == 1 else self.lr
            stages = tuple(dataclasses.replace(s, learning_rate=rate) for s, rate in zip(stages, rates, strict=True))
        return stages

    def settings(self, processes: int) -> TrainingSettings:
        """Return the settings of a run of this many processes."""
        clip: Literal["all", "first"] = "first" if self.faithful and self.recipe == "drn" else "all"
        return TrainingSettings(
            recipe=self.recipe,
            stages=self.stages,
            batch_size=self.queries_per_step,
            clip_norm=self.preset.clip_norm,
            losses=dataclasses.replace(self.preset.losses, iou_target=self.iou_target, iou_clip=clip),
            precision=self.precision,
            seed=self.seed,
            faithful=self.faithful,
            processes=processes,
            synchronised=not self.faithful,
            negatives=self.negatives,
        )

    def validate(self) -> None:
        """Check what can be checked before any file is read.

        Raises:
            GroundingError: an option is out of range, or contradicts another.
            CheckpointError: stage 2 or 3 has no network to start from.
        """
        first = self.stages[0].number
        if first > 1 and self.load is None:
            raise CheckpointError(
                f"Stage {first} starts from a trained network; pass --load {self.output}/stage{first - 1}/best.pt "
                "(or another checkpoint), or train --stage all.",
                code="missing_option",
            )
        self._validate_numbers()
        self._validate_sizes()
        if self.glove and self.load:
            raise GroundingError(
                "--glove sets the words of a fresh network and --load brings its own; leave one out.",
                code="conflicting_options",
            )
        batch_size, negatives = self.queries_per_step, self.negatives
        if not 0 <= negatives <= MAX_NEGATIVES or (negatives and not round(negatives * batch_size)):
            raise GroundingError(
                f"--negatives is 0 to {MAX_NEGATIVES} mismatched pairs for each matching one, and, if any, one or more "
                f"in a step of {batch_size}; {negatives:g} was given.",
                code="invalid_option",
            )

    def _validate_numbers(self) -> None:
        if not 0 < self.held_out < 1:
            raise GroundingError(
                f"--held-out is the fraction of videos to validate on, between 0 and 1, and {self.held_out} is not.",
                code="invalid_option",
            )
        if self.batch_size is not None and self.batch_size < 1:
            raise GroundingError(
                f"--batch-size must be at least 1, and {self.batch_size} was given.", code="invalid_option"
            )
        if not 0 <= self.seed < 2**63:
            raise GroundingError(
                f"--seed must be 0 or more and below 2**63, and {self.seed} was given.", code="invalid_option"
            )

    def _validate_sizes(self) -> None:
        multiples = {"num_segments": 4, "fpn_dim": 2}
        for name, size in self.sizes.items():
            multiple = multiples.get(name, 1)
            if not 1 <= size <= MAX_SIZE or size % multiple:
                expected = "" if multiple == 1 else f"a multiple of {multiple}, and "
                raise GroundingError(
                    f"--{name.replace('_', '-')} must be {expected}from 1 to {MAX_SIZE}, and {size} was given.",
                    code="invalid_option",
                )
