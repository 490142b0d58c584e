"""Train in several processes started by torchrun, with batch norm and losses over the batches of all processes."""

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
    """The training processes, seen from one of them.

    Attributes:
        rank: index of this process among all, from 0.
        count: number of processes.
        local_rank: index of this process among those of this machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes, without a gradient; the tensor itself is not changed."""
        if self.count > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def of_main(self, value: float, device: torch.device) -> float:
        """Return the value that the main process passes; those of other processes are ignored."""
        if self.count == 1:
            return value
        return self.sum(torch.tensor(value if self.is_main else 0.0, dtype=torch.float64, device=device)).item()

    def wait(self) -> None:
        """Wait until all processes have called this method."""
        if self.count > 1:
            dist.barrier()


@contextlib.contextmanager
def init_distributed(device: torch.device) -> Iterator[Processes]:
    """Join the process group, if torchrun started several processes; NCCL on GPUs, gloo on CPUs.

    Raises:
        DeviceError: there are more processes than GPUs.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes()
        return
    local_rank = int(os.environ["LOCAL_RANK"])
    if device.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise DeviceError(
                f"torchrun started process {local_rank}, but this machine has {torch.cuda.device_count()} GPUs. Pass a "
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
    """Batch norm with the training statistics of the batches of all processes.

    torch.nn.SyncBatchNorm accepts GPU tensors only; this class also works with gloo.
    """

    # torch declares these as optional, for batch norms without running statistics.
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, values: Tensor) -> Tensor:
        if not self.training:
            return super().forward(values)
        # In float32, as batch norm on one device computes for all precisions.
        dtype, values = values.dtype, values.float()
        count = all_reduce(values.new_full((), values.shape[0] * values.shape[2]))
        mean = all_reduce(values.sum(dim=(0, 2))) / count
        centered = values - mean[:, None]
        # Two passes, because the difference of two large sums is inaccurate.
        variance = all_reduce((centered * centered).sum(dim=(0, 2))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            unbiased = variance * (count / (count - 1))
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centered * scale[:, None] + self.bias[:, None]).to(dtype)


def synchronize_batch_norm(model: nn.Module) -> None:
    """Replace the class of every batch norm of `model` by `SyncedBatchNorm1d`; names and weights do not change."""
    for module in model.modules():
        if type(module) is nn.BatchNorm1d:
            module.__class__ = SyncedBatchNorm1d
