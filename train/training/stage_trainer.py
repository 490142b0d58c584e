"""Take the optimizer steps of a stage, with mixed precision, gradient clipping, and several processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from train.network.losses import divide, loss_sums
from train.network.model import DRN
from train.training.distributed import Processes
from train.training.options import TrainingSettings
from train.training.recipes import Stage

_AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


class StageTrainer:
    """Takes the optimizer steps of one stage.

    Args:
        stage: the stage; its parameters require gradients from here on.
        settings: settings of the run, of which precision, gradient clipping and losses are used.
        processes: the training processes.
        model: the network, on its device.
    """

    def __init__(self, stage: Stage, settings: TrainingSettings, processes: Processes, model: DRN) -> None:
        self.stage, self.settings, self.processes, self.model = stage, settings, processes, model
        self.network: nn.Module = model
        self.autocast = _AMP.get(settings.precision)
        # The authors' stage 2 computes all gradients and resets only those of the IoU head, so that the others
        # accumulate in the norm for clipping.
        self.accumulates_stale_gradients = settings.faithful and settings.recipe == "drn" and stage.number == 2
        stage.freeze(model)
        self.trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.clipped = list(model.parameters()) if self.accumulates_stale_gradients else self.trainable
        if self.accumulates_stale_gradients:
            model.requires_grad_(True)
        self.device = self.trainable[0].device
        self.optimizer = torch.optim.Adam(self.trainable, lr=stage.learning_rate, fused=True)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "fp16")

    def set_network(self, network: nn.Module) -> None:
        """Use `network`, the model or a part of it, in the following steps."""
        self.network = network
        if self.processes.count > 1:
            # With the IoU loss only, the matching logits get no gradient.
            self.network = DistributedDataParallel(
                network,
                broadcast_buffers=not self.settings.synchronised,
                find_unused_parameters=self.accumulates_stale_gradients,
            )

    def step(self, inputs: Sequence[Tensor], truth: Tensor) -> Tensor:
        """Take one optimizer step.

        Args:
            truth: (B, 2) moments as fractions of the video.

        Returns:
            (5,) on the device, the share of this process in: the three losses, the gradient norm, and 1. The last two
            are 0 for a step that was skipped because its gradients overflowed in fp16.
        """
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            heads = self.network(*inputs)
        sums = loss_sums(heads, truth, self.model.config, self.stage.trains_iou_head, self.settings.losses)
        if self.settings.synchronised:
            losses = divide(sums, self.processes.sum(sums.counts))
            # DistributedDataParallel averages gradients, but these losses are parts of a sum.
            share = self.processes.count
        else:
            losses, share = divide(sums), 1
        loss = losses.iou if self.accumulates_stale_gradients else losses.total()
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss * share).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.clipped, self.settings.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        taken = norm.isfinite() | (not self.scaler.is_enabled())
        norm = torch.where(taken, norm, 0.0)
        return torch.stack((*(each.detach() for each in losses), norm / share, taken / share))
