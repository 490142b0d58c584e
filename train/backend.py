"""The network in torch, behind the same protocol as an exported one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from runtime.artifacts.manifest import Manifest
from runtime.backends.base import Device
from runtime.core.batch import Batch, Heads
from runtime.core.errors import DeviceError, DeviceMemoryError, excerpt, is_out_of_memory
from train.checkpoints import checkpoint_of, opened
from train.network.model import DRN


class TorchBackend:
    """A network in evaluation mode, on the device its parameters are on."""

    def __init__(self, model: DRN, manifest: Manifest) -> None:
        self.model = model
        self.manifest = manifest

    @torch.inference_mode()
    def run(self, batch: Batch) -> Heads:
        """Return the heads of a batch; the network's training mode is restored afterwards.

        Raises:
            DeviceMemoryError: the GPU has no memory left for it.
        """
        if not len(batch):
            # torch packs no empty batch.
            locations = self.manifest.decoding.num_locations
            return Heads(*(np.empty((0, locations, *tail), np.float32) for tail in ((), (2,), ())))
        device = next(self.model.parameters()).device
        training = self.model.training
        self.model.eval()
        try:
            with _without_tf32():
                heads = self.model(*(torch.from_numpy(array).to(device) for array in vars(batch).values()))
        except RuntimeError as error:
            # Of torch's allocator it is OutOfMemoryError; of cuBLAS, cuDNN and the driver a plain RuntimeError.
            if not is_out_of_memory(error):
                raise
            # What torch keeps for later would be missing to a smaller batch now.
            torch.cuda.empty_cache()
            raise DeviceMemoryError(
                f"{device} has no memory left for a batch of {len(batch)} queries; pass a smaller --batch-size."
            ) from error
        finally:
            self.model.train(training)
        return Heads(*(np.ascontiguousarray(tensor.float().cpu().numpy()) for tensor in heads))


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """Compute FP32 convolutions and LSTMs in FP32: cuDNN takes TF32 by default (torch.backends.cudnn.allow_tf32)."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def open_checkpoint(path: str | os.PathLike[str], device: Device = "auto", threads: int | None = None) -> TorchBackend:
    """Open a `drn.pt`. The entry point through which `runtime.open_backend` finds torch.

    `threads` sets torch's CPU threads, which hold for the whole process.
    """
    target = torch_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    with opened(path) as (content, file_sha256):
        checkpoint = checkpoint_of(content, path)
        model = checkpoint.model(copy=False).to(target)
        manifest = checkpoint.manifest(sources={Path(path).name: file_sha256()})
    return TorchBackend(model, manifest)


def torch_device(device: str) -> torch.device:
    """Return a device by name; `auto` is a GPU where there is one. Raises DeviceError for one that is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise DeviceError(f"--device is auto, cpu or cuda, and {excerpt(device)} was given.", code="unknown_device")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise DeviceError(
            f"The device {device} was asked for and torch {torch.__version__} finds no GPU; pass --device cpu.",
            code="gpu_unavailable",
        )
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise DeviceError(
            f"--device is auto, cpu or cuda, and {excerpt(device)} was given.", code="unknown_device"
        ) from error
