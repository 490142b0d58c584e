"""Run the torch network through the backend protocol of exported models."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from runtime.artifacts.manifest import Manifest
from runtime.backends.base import Device
from runtime.core.batch import Batch, Heads, check_numbers
from runtime.core.errors import DeviceError, DeviceMemoryError, excerpt, is_out_of_memory
from train.checkpoints import checkpoint_of, opened
from train.network.model import DRN


class TorchBackend:
    """Runs a network in evaluation mode, on the device of its parameters."""

    def __init__(self, model: DRN, manifest: Manifest) -> None:
        self.model = model
        self.manifest = manifest

    @torch.inference_mode()
    def run(self, batch: Batch) -> Heads:
        """Return the heads of a batch, and restore the training mode of the network; see `Backend.run` for shapes.

        Raises:
            ShapeError: a word id or a length is out of range.
            DeviceMemoryError: the GPU has no memory left for the batch.
        """
        check_numbers(batch.query_tokens, batch.query_length, len(self.manifest.vocabulary))
        if not len(batch):
            # torch cannot pack an empty batch of sequences.
            locations = self.manifest.decoding.num_locations
            return Heads(*(np.empty((0, locations, *tail), np.float32) for tail in ((), (2,), ())))
        device = next(self.model.parameters()).device
        training = self.model.training
        self.model.eval()
        try:
            with _without_tf32():
                heads = self.model(*(torch.from_numpy(array).to(device) for array in vars(batch).values()))
        except RuntimeError as error:
            # torch's allocator raises OutOfMemoryError; cuBLAS, cuDNN and the driver raise a plain RuntimeError.
            if not is_out_of_memory(error):
                raise
            # Memory that torch caches would not be available to a smaller batch.
            torch.cuda.empty_cache()
            raise DeviceMemoryError(
                f"{device} has no memory left for a batch of {len(batch)} queries. Pass a smaller --batch-size."
            ) from error
        finally:
            self.model.train(training)
        return Heads(*(np.ascontiguousarray(tensor.float().cpu().numpy()) for tensor in heads))


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """Compute FP32 convolutions and LSTMs in FP32; cuDNN uses TF32 by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def open_checkpoint(path: str | os.PathLike[str], device: Device = "auto", threads: int | None = None) -> TorchBackend:
    """Open a `drn.pt`; the entry point `pt` of `drn.backends`, through which `runtime.open_backend` loads torch.

    Args:
        device: `auto`, `cpu` or `cuda`; `auto` selects a GPU if torch finds one.
        threads: number of CPU threads of torch in this process. Default: unchanged.

    Raises:
        CheckpointError: the file is missing, contains code, is damaged, or is not a DRN checkpoint.
        DeviceError: the device is unknown or not available.
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
    """Return the device of a name; `auto` is the GPU if there is one.

    Raises:
        DeviceError: the name is unknown, or there is no GPU.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    parsed: torch.device | None = None
    with contextlib.suppress(RuntimeError):
        parsed = torch.device(device)
    if parsed is None or parsed.type not in ("cpu", "cuda"):
        raise DeviceError(
            f"Expected --device auto, cpu or cuda, got {excerpt(device)}. Correct the option.", code="unknown_device"
        )
    if parsed.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            f"torch {torch.__version__} finds no GPU for --device {device}. Pass --device cpu.", code="gpu_unavailable"
        )
    return parsed
