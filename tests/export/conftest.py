"""Define fixtures: tiny networks with random weights and their exported graphs, built once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from export.tracing.tracer import export_model
from runtime.artifacts.manifest import Features, Manifest
from runtime.core.decoding import Decoding
from runtime.core.tokenizer import Vocabulary
from tests.train.training.narrow import narrow_backbone, with_narrow_backbone
from train.checkpoints import Checkpoint, save_checkpoint
from train.network.model import DRN, DRNConfig, Scale

__all__ = ["narrow_backbone"]

TINY = DRNConfig(vocab_size=20, embed_dim=8, hidden_dim=12, feature_dim=16, fpn_dim=16, num_segments=16)
DEEP = DRNConfig(
    vocab_size=20,
    embed_dim=8,
    hidden_dim=12,
    feature_dim=16,
    fpn_dim=16,
    num_segments=64,
    head_convs=2,
    lstm_layers=2,
)
CONFIGS = {"tiny": TINY, "deep": DEEP}
MAX_QUERY_LENGTH = 12

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def lively(config: DRNConfig) -> DRN:
    """Return a network with random weights and batch norm statistics, which are 0 and 1 in a new one."""
    torch.manual_seed(0)
    model = DRN(config)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias, 0, 0.3)
        elif isinstance(module, nn.Conv1d):
            nn.init.normal_(module.weight, 0, (1 / module.weight[0].numel()) ** 0.5)
            if module.bias is not None:
                nn.init.normal_(module.bias, 0, 0.3)
        elif isinstance(module, Scale):
            nn.init.uniform_(module.scale, 0.5, 1.5)
        elif isinstance(module, nn.LSTM | nn.Linear):
            for parameter in module.parameters():
                nn.init.normal_(parameter, 0, 0.4)
    return model.eval()


def random_inputs(config: DRNConfig, lengths: list[int], longest: int | None = None, seed: int = 0) -> Inputs:
    """Return inputs for queries of these lengths, padded to `longest`."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, config.vocab_size + 1, (len(lengths), longest or max(lengths)))
    tokens[np.arange(tokens.shape[1]) >= np.array(lengths)[:, None]] = 0
    features = rng.standard_normal((len(lengths), config.num_segments, config.feature_dim)).clip(0)
    spans = np.sort(rng.random((len(lengths), config.num_segments, 2)))
    return (
        torch.tensor(tokens, dtype=torch.int32),
        torch.tensor(lengths, dtype=torch.int32),
        torch.tensor(features, dtype=torch.float32),
        torch.tensor(spans, dtype=torch.float32),
    )


def manifest(config: DRNConfig) -> Manifest:
    words = {f"word{index}": index for index in range(1, config.vocab_size + 1)}
    return Manifest(
        Vocabulary(words),
        Decoding(num_segments=config.num_segments),
        Features(dim=config.feature_dim),
        max_query_length=MAX_QUERY_LENGTH,
        sources={"drn.pt": "0" * 64},
    )


@pytest.fixture(scope="session")
def networks() -> dict[str, DRN]:
    with with_narrow_backbone():
        return {name: lively(config) for name, config in CONFIGS.items()}


@pytest.fixture(scope="session")
def exported(networks: dict[str, DRN]) -> dict[str, onnx.ModelProto]:
    return {name: export_model(model, manifest(model.config)) for name, model in networks.items()}


@pytest.fixture(scope="session")
def checkpoint(networks: dict[str, DRN], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny network as a `drn.pt`."""
    model = networks["tiny"]
    about = manifest(model.config)
    path = tmp_path_factory.mktemp("checkpoint") / "drn.pt"
    save_checkpoint(
        path,
        Checkpoint(model.config, about.features, about.vocabulary, about.decoding, model.state_dict(), {"stage": 2}),
    )
    return path
