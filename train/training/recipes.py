"""Define the three training stages and the two published recipes.

Stage 1 trains everything but the IoU head, stage 2 only the IoU head, stage 3 everything at a low learning rate.
Source: configs/localization/drn in mmaction2; main.py and drn_train.sh in the authors' code.
"""

from __future__ import annotations

import dataclasses

from train.network.model import DRN

IOU_HEAD = ("fcos.head.mix_fc.", "fcos.head.iou_scores.")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training stage.

    Attributes:
        number: 1, 2 or 3.
        learning_rate: learning rate of Adam, after the warm-up.
        epochs: number of epochs.
        warmup_epochs: number of epochs in which the learning rate rises linearly from a tenth.
    """

    number: int
    learning_rate: float
    epochs: int
    warmup_epochs: int = 0

    @property
    def trains_iou_head(self) -> bool:
        """Whether the IoU head is trained, so that scores include the IoU probability."""
        return self.number > 1

    @property
    def freezes_stem(self) -> bool:
        """Whether no layer before the first batch norm is trained, so that its outputs are equal in every epoch."""
        return self.number == 2

    @property
    def learns_from_mismatched(self) -> bool:
        """Whether mismatched pairs contribute to the loss. They have no target for the IoU loss."""
        return self.number != 2

    def learning_rate_at(self, epoch: int) -> float:
        """Return the learning rate of an epoch, numbered from 0."""
        if epoch >= self.warmup_epochs - 1:
            return self.learning_rate
        return self.learning_rate * (0.1 + 0.9 * epoch / (self.warmup_epochs - 1))

    def trains(self, parameter: str) -> bool:
        """Return whether the parameter of this name is trained in this stage."""
        in_iou_head = parameter.startswith(IOU_HEAD)
        return {1: not in_iou_head, 2: in_iou_head, 3: True}[self.number]

    def freeze(self, model: DRN) -> None:
        """Require gradients of the parameters of this stage only.

        As published, batch norm still updates its running statistics everywhere.
        """
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.trains(name))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A published training recipe, for the pooling of clips, the NMS and the hit rule of the same name.

    Attributes:
        stages: the three stages.
        batch_size: queries per process and step.
        clip_norm: maximum total gradient norm.
    """

    stages: tuple[Stage, Stage, Stage]
    batch_size: int
    clip_norm: float


RECIPES: dict[str, Recipe] = {
    "mmaction2": Recipe(
        stages=(Stage(1, 1e-3, 10, warmup_epochs=5), Stage(2, 1e-5, 10), Stage(3, 1e-6, 10)),
        # Published with two GPUs of 16 each.
        batch_size=16,
        clip_norm=5.0,
    ),
    "drn": Recipe(
        # Later stages resume the epoch counter of the checkpoint that they load, and stop at 50.
        stages=(Stage(1, 1e-3, 10), Stage(2, 1e-5, 40), Stage(3, 1e-7, 40)),
        batch_size=32,
        clip_norm=0.5,
    ),
}
