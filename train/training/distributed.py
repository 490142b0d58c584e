"""More than one training process: batch norm and losses over the whole batch, whatever share each process has.

Started by torchrun, which sets the environment that torch.distributed reads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from runtime.core.errors import DeviceError


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process among all."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Return whether this process writes files and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over all processes, without a gradient."""
        if self.count > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        """Return once every process is here."""
        if self.count > 1:
            dist.barrier()


@contextlib.contextmanager
def init_distributed(device: torch.device) -> Iterator[Processes]:
    """Join the other processes, if torchrun started more than one; NCCL on GPUs, gloo on CPUs."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes()
        return
    local_rank = int(os.environ["LOCAL_RANK"])
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise DeviceError(
                f"torchrun started process {local_rank} and this machine has {torch.cuda.device_count()} GPUs; "
                "lower --nproc-per-node.",
                code="too_few_gpus",
            )
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), count, local_rank)
    finally:
        dist.destroy_process_group()


class SyncedBatchNorm1d(nn.BatchNorm1d):
    """Batch norm whose training statistics are those of all processes' batches together.

    torch's own takes GPU tensors only; this one also serves gloo, where it can be tested.
    """

    def forward(self, values: Tensor) -> Tensor:
        if not self.training:
            return super().forward(values)
        # In float32 whatever the precision of the values, as batch norm on one device is.
        dtype, values = values.dtype, values.float()
        count = all_reduce(values.new_full((), values.shape[0] * values.shape[2]))
        mean = all_reduce(values.sum(dim=(0, 2))) / count
        centred = values - mean[:, None]
        # Two passes: the difference of two large sums would lose the variance.
        variance = all_reduce((centred * centred).sum(dim=(0, 2))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            unbiased = variance * (count / (count - 1))
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None] + self.bias[:, None]).to(dtype)


def synchronise_batch_norm(model: nn.Module) -> None:
    """Let every batch norm of `model` take its statistics over all processes. Names and weights stay."""
    for module in model.modules():
        if type(module) is nn.BatchNorm1d:
            module.__class__ = SyncedBatchNorm1d
