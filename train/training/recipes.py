"""The three training stages, and the two published recipes.

Stage 1 learns all but the IoU head, stage 2 the IoU head alone, stage 3 everything at a small rate.
Source: configs/localization/drn in mmaction2; main.py and drn_train.sh in the authors' code.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from train.network.losses import LossOptions
from train.network.model import DRN

IOU_HEAD = ("fcos.head.mix_fc.", "fcos.head.iou_scores.")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training stage.

    Attributes:
        number: 1, 2 or 3.
        learning_rate: of Adam, after the warm-up.
        epochs: how many.
        warmup_epochs: over these the rate rises linearly from a tenth.
    """

    number: int
    learning_rate: float
    epochs: int
    warmup_epochs: int = 0

    @property
    def trains_iou_head(self) -> bool:
        return self.number > 1

    @property
    def freezes_stem(self) -> bool:
        """Return whether no layer before the first batch norm is trained, so that its output for a pair is the same in
        every epoch.
        """
        return self.number == 2

    @property
    def learns_from_mismatched(self) -> bool:
        """Return whether mismatched pairs contribute to the loss; without an overlap, the IoU loss has no target."""
        return self.number != 2

    @property
    def use_iou_scores(self) -> bool:
        """Return whether the IoU probability is part of the score; an untrained head must not be."""
        return self.number > 1

    def learning_rate_at(self, epoch: int) -> float:
        """Return the rate in `epoch`, counted from 0."""
        if epoch >= self.warmup_epochs - 1:
            return self.learning_rate
        return self.learning_rate * (0.1 + 0.9 * epoch / (self.warmup_epochs - 1))

    def trains(self, parameter: str) -> bool:
        """Return whether a parameter, by name, is learnt in this stage."""
        in_iou_head = parameter.startswith(IOU_HEAD)
        return {1: not in_iou_head, 2: in_iou_head, 3: True}[self.number]

    def freeze(self, model: DRN) -> None:
        """Let only this stage's parameters take gradients, which also cuts the graph where the published code detaches.

        Batch norm keeps updating its statistics everywhere, as published.
        """
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.trains(name))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A published training recipe.

    Attributes:
        stages: the three stages.
        batch_size: queries per process and step.
        clip_norm: largest total gradient norm.
        initialisation: `torch` defaults, or the authors' (Kaiming convolutions, Glorot language layers).
        pooling: how clips become segments.
        protocol: NMS and hit rule of validation.
        losses: where losses follow which rule.
    """

    stages: tuple[Stage, Stage, Stage]
    batch_size: int
    clip_norm: float
    initialisation: Literal["torch", "drn"]
    pooling: Literal["mmaction2", "drn"]
    protocol: Literal["mmaction2", "drn"]
    losses: LossOptions = dataclasses.field(default_factory=LossOptions)


RECIPES: dict[str, Recipe] = {
    "mmaction2": Recipe(
        stages=(Stage(1, 1e-3, 10, warmup_epochs=5), Stage(2, 1e-5, 10), Stage(3, 1e-6, 10)),
        # Two GPUs with 16 each; one process takes 16, as one of theirs does.
        batch_size=16,
        clip_norm=5.0,
        initialisation="torch",
        pooling="mmaction2",
        protocol="mmaction2",
    ),
    "drn": Recipe(
        # Their later stages resume the epoch counter of the file they load and stop at 50.
        stages=(Stage(1, 1e-3, 10), Stage(2, 1e-5, 40), Stage(3, 1e-7, 40)),
        batch_size=32,
        clip_norm=0.5,
        initialisation="drn",
        pooling="drn",
        protocol="drn",
    ),
}
