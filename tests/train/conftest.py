"""Share the published network's outputs, a tiny network, and one short run of it.

Networks have a narrow backbone, except in tests of golden files.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from tests.train.training.narrow import narrow_backbone, set_backbone, with_narrow_backbone
from train.__main__ import train
from train.network.model import DRN, DRNConfig, NetworkHeads

GOLDEN = Path(__file__).parents[1] / "golden"
# DRN_GOLDEN is a directory of golden files of other seeds and sizes.
DIRECTORIES = [GOLDEN, *(Path(path) for path in (os.environ.get("DRN_GOLDEN"),) if path)]
CASES = [p for path in DIRECTORIES for p in sorted(path.glob("*_seed*.npz")) if not p.stem.endswith("_train")]
HEAD_NAMES = ("cls", "box", "iou")
TINY_SIZES: dict[str, Any] = {
    "embed_dim": 8,
    "hidden_dim": 16,
    "fpn_dim": 16,
    "num_segments": 16,
    "batch_size": 16,
    "epochs": (2, 1, 1),
    "lr": (1e-3, 1e-3, 1e-4),
    # After so few steps no proposal overlaps by 0.9, which the published rule requires to train the IoU head.
    "iou_target": "all",
}
TrainTiny = Callable[..., Path]


__all__ = ["narrow_backbone"]


@pytest.fixture(autouse=True)
def published_backbone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if {"reference", "golden"} & {*request.fixturenames}:
        set_backbone(monkeypatch)


@dataclasses.dataclass(frozen=True)
class Reference:
    """Outputs of mmaction2's code with weights of the recipe."""

    arrays: dict[str, np.ndarray]
    training: dict[str, np.ndarray]
    config: DRNConfig
    state: dict[str, np.ndarray]

    def model(self) -> DRN:
        """Return our network with the same weights, in evaluation mode."""
        with pytest.MonkeyPatch.context() as patch:
            set_backbone(patch)
            model = DRN(self.config)
        model.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in self.state.items()})
        return model.eval()

    def inputs(self, batch: str) -> list[torch.Tensor]:
        """Return the network's inputs of batch a, b or c, in the order of the data set."""
        names = ("query_tokens", "query_length", "features", "proposals")
        return [torch.from_numpy(self.arrays[f"{batch}_in_{name}"]) for name in names]

    def heads(self, prefix: str, order: np.ndarray) -> list[np.ndarray]:
        """Return recorded heads in our shapes, and in the order of the data set; `order` sorted them by length."""
        source = self.arrays if f"{prefix}_cls_0" in self.arrays else self.training
        joined = [np.concatenate([source[f"{prefix}_{h}_{level}"] for level in range(3)], 2) for h in HEAD_NAMES]
        back = np.argsort(order)
        return [joined[0][back, 0], joined[1][back].transpose(0, 2, 1), joined[2][back, 0]]


def config_of(shapes: Path) -> DRNConfig:
    """Return the network that a `state_dict_*.json` lists."""
    listed = json.loads(shapes.read_text())
    config = {**listed["config"], **listed["changed"]}
    return DRNConfig(
        vocab_size=config["vocab_size"],
        embed_dim=config["embed_dim"],
        feature_dim=listed["feature_dim"],
        hidden_dim=config["hidden_dim"],
        fpn_dim=config["fpn_feature_dim"],
    )


@pytest.fixture(scope="session", params=CASES, ids=lambda path: path.stem)
def reference(request: pytest.FixtureRequest, recipe: ModuleType) -> Reference:
    path: Path = request.param
    size, seed = path.stem.split("_seed")
    shapes = path.with_name(f"state_dict_{size}.json")
    arrays = dict(np.load(path))
    training = path.with_name(f"{path.stem}_train.npz")
    options = {"zero_pad_row": bool(arrays["zero_pad_row"]), "cls_bias": float(arrays["cls_bias"])}
    state = recipe.make_state(recipe.load_shapes(shapes), seed=int(seed), **options)
    return Reference(arrays, dict(np.load(training)) if training.is_file() else {}, config_of(shapes), state)


@pytest.fixture(scope="session")
def tiny() -> DRNConfig:
    return DRNConfig(vocab_size=20, embed_dim=8, feature_dim=32, hidden_dim=16, fpn_dim=16)


@pytest.fixture(scope="session")
def train_tiny(planted: Path) -> TrainTiny:
    """Train a small network into a directory, on the planted data set or another one, with options of `train`."""

    def run(output: Path, data: Path = planted, **options: Any) -> Path:
        return train(data, output, **{**TINY_SIZES, **options})

    return run


@pytest.fixture(scope="session")
def short_run(tmp_path_factory: pytest.TempPathFactory, train_tiny: TrainTiny) -> Path:
    """Return the directory of a three-stage run on the planted data set."""
    output = tmp_path_factory.mktemp("short") / "run"
    with with_narrow_backbone():
        train_tiny(output)
    return output


def train_words(data: Path, output: Path, **options: Any) -> list[str]:
    """Return the words of a command that trains as `train_tiny`, without the program."""
    words = ["--data", str(data), "--output", str(output)]
    for name, value in {**TINY_SIZES, **options}.items():
        words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
    return words


def shorten(data: Path, directory: Path, count: int) -> Path:
    """Copy a data set with only its first `count` training queries."""
    shutil.copytree(data, directory, ignore=shutil.ignore_patterns("cache"))
    path = directory / "Charades_sta_train.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:count]))
    return directory


def random_inputs(config: DRNConfig, lengths: list[int], seed: int = 0) -> list[torch.Tensor]:
    """Return inputs for queries of these lengths, one for each."""
    generator = torch.Generator().manual_seed(seed)
    batch, longest = len(lengths), max(lengths)
    length = torch.tensor(lengths)
    tokens = torch.randint(1, config.vocab_size + 1, (batch, longest), generator=generator)
    tokens[torch.arange(longest)[None] >= length[:, None]] = 0
    features = torch.rand(batch, config.num_segments, config.feature_dim, generator=generator)
    edges = torch.linspace(0, 1, config.num_segments + 1)
    spans = torch.stack((edges[:-1], edges[1:]), 1).expand(batch, -1, -1).contiguous()
    return [tokens, length, features, spans]


@pytest.fixture(scope="session")
def as_arrays() -> Any:
    def convert(heads: NetworkHeads) -> list[np.ndarray]:
        return [head.detach().numpy() for head in heads]

    return convert
