"""Test `train.training.distributed`: several processes compute what one computes on the complete batch."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from runtime.artifacts.manifest import Features
from runtime.core.decoding import Decoding
from runtime.core.tokenizer import Vocabulary
from tests.forked_commands import ForkedCommand
from tests.raising import quotes
from tests.tolerances import PROCESS_WEIGHTS, PROCESSES
from tests.train.conftest import TrainTiny, shorten, train_words
from train.checkpoints import load_checkpoint
from train.history import read_history
from train.network.losses import LossOptions
from train.training.distributed import Processes, SyncedBatchNorm1d, init_distributed, synchronize_batch_norm
from train.training.inputs import TrainingInputs
from train.training.options import TrainingSettings
from train.training.recipes import RECIPES
from train.training.trainer import TrainingRun


def together(data: Path, output: Path, *arguments: str, **options: Any) -> str:
    """Train as `train_tiny` with two processes, and return what they print to stderr."""
    words = ["python", "-m", "tests.train.training.two_processes", *train_words(data, output, **options)]
    result = ForkedCommand([*words, *arguments]).finish()
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("drn.pt") == 1, "only the leader prints"
    return result.stderr


def history(run: Path) -> list[dict[str, Any]]:
    return read_history(run / "history.jsonl")


def test_two_processes_equal_one_with_full_batch(train_tiny: TrainTiny, planted: Path, tmp_path: Path) -> None:
    # With as many epochs of stage 2 as processes, each computes the frozen part once. Stage 2 has no negatives.
    sizes = {"epochs": (1, 2, 1), "lr": (1e-4, 1e-4, 1e-5), "validate_on": "none", "negatives": 0.5}
    data = shorten(planted, tmp_path / "data", 48)
    train_tiny(tmp_path / "one", data, batch_size=8, **sizes)
    log = together(data, tmp_path / "two", batch_size=4, **sizes)
    assert quotes(log, "2 processes")
    one, two = history(tmp_path / "one"), history(tmp_path / "two")
    assert [record["stage"] for record in two] == [1, 2, 2, 3]
    for expected, actual in zip(one, two, strict=True):
        assert expected["steps"] == actual["steps"] > 5
        for name in ("loss_matching", "loss_boundary", "loss_iou", "gradient_norm"):
            assert actual[name] == pytest.approx(expected[name], rel=PROCESSES), (expected["stage"], name)
    expected, actual = (load_checkpoint(tmp_path / name / "drn.pt").weights for name in ("one", "two"))
    for name, tensor in expected.items():
        if name.endswith("num_batches_tracked"):
            assert torch.equal(actual[name], tensor), name
            continue
        # Steps along a gradient that is rounding noise have any direction.
        errors = (actual[name] - tensor).abs() / tensor.abs().max().clamp(min=1e-3)
        assert float(errors.median()) < PROCESS_WEIGHTS or _is_noise(name), name


def _is_noise(name: str) -> bool:
    before_batch_norm = ("cls_tower.0.bias", "bbox_tower.0.bias", "mix_fc.0.bias", "iou_scores.0.bias")
    return name.endswith(("W1.bias", *before_batch_norm))


def test_published_distributed_and_authors_recipes_run(train_tiny: TrainTiny, planted: Path, tmp_path: Path) -> None:
    data = shorten(planted, tmp_path / "data", 48)
    together(data, tmp_path / "faithful", "--faithful", epochs=(1,), batch_size=4, recipe="drn")
    train_tiny(tmp_path / "one", data, epochs=(1,), batch_size=8, faithful=True, recipe="drn")
    faithful, one = history(tmp_path / "faithful"), history(tmp_path / "one")
    assert [record["stage"] for record in faithful] == [1, 2, 3]
    # Each process has its own statistics and divisors, so that results are similar but not equal.
    first = faithful[0]["loss_matching"], one[0]["loss_matching"]
    assert first[0] == pytest.approx(first[1], rel=0.5)
    assert first[0] != pytest.approx(first[1], rel=PROCESSES)


def test_init_distributed_without_torchrun_is_single_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with init_distributed(torch.device("cpu")) as processes:
        assert processes == Processes(0, 1, 0)
        assert processes.is_main
        processes.wait()
        assert float(processes.sum(torch.tensor(3.0))) == 3
    assert not dist.is_initialized()


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """Create a group of one process, in which the synchronized code runs as in one of many."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.filterwarnings("ignore:torch.distributed.nn.functional.all_reduce:FutureWarning")
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_synchronized_batch_norm_equals_batch_norm(precision: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = nn.BatchNorm1d(6)
    nn.init.normal_(plain.weight)
    synced = nn.Sequential(copy.deepcopy(plain))
    synchronize_batch_norm(synced)
    assert type(synced[0]) is SyncedBatchNorm1d
    # Sums in half precision are too coarse for a mean far from zero.
    values = (torch.randn(5, 6, 3) + 20).to(precision)
    inputs = [values.clone().requires_grad_() for _ in range(2)]
    results = [module(tensor) for module, tensor in zip((plain, synced), inputs, strict=True)]
    assert results[0].dtype == results[1].dtype == precision
    close = {"rtol": 1e-4, "atol": 1e-5} if precision == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(results[1], results[0], **close)
    for result in results:
        (result.float() * torch.arange(18).reshape(6, 3)).sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=close["rtol"], atol=close["atol"] * 10)
    torch.testing.assert_close(synced[0].running_mean, plain.running_mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(synced[0].running_var, plain.running_var, rtol=1e-4, atol=1e-5)
    assert int(synced[0].num_batches_tracked) == 1
    plain.eval()
    synced.eval()
    torch.testing.assert_close(synced(values.float()), plain(values.float()))
    assert list(synced[0].state_dict()) == list(plain.state_dict())


class Meeting(Processes):
    """A leader whose first wait lets the other process open the run."""

    def wait(self) -> None:
        others = self.others  # type: ignore[attr-defined]
        if others:
            others.pop()()


def test_slow_process_accepts_the_rank_zero_run(tmp_path: Path) -> None:
    recipe = RECIPES["mmaction2"]
    settings = TrainingSettings("mmaction2", recipe.stages, 4, 5.0, LossOptions(), "fp32", 0, False, 2, True)
    inputs = TrainingInputs(None, None, [], Vocabulary({"a": 1}), Features(), Decoding())  # type: ignore[arg-type]

    @dataclasses.dataclass(frozen=True)
    class Second(Processes):
        def wait(self) -> None: ...

    leader, second = Meeting(0, 2, 0), Second(1, 2, 1)
    opened = []

    def follow() -> None:
        TrainingRun(tmp_path, settings, inputs, torch.device("cpu"), second).open(False, {})
        opened.append(True)

    object.__setattr__(leader, "others", [follow])
    TrainingRun(tmp_path, settings, inputs, torch.device("cpu"), leader).open(False, {})
    assert opened
    assert (tmp_path / "run.json").is_file()
