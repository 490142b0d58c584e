"""Test `export.tracing.exportable_model` in torch, without an export."""

from __future__ import annotations

import pytest
import torch

from export.tracing.exportable_model import ExportableDRN
from tests import tolerances
from tests.export.conftest import CONFIGS, Inputs, lively, random_inputs
from train.network.model import DRN, NetworkHeads


@pytest.fixture(scope="module")
def graphs(networks: dict[str, DRN]) -> dict[str, ExportableDRN]:
    return {name: ExportableDRN(model) for name, model in networks.items()}


def answers(module: torch.nn.Module, inputs: Inputs) -> NetworkHeads:
    with torch.inference_mode():
        return module(*inputs)


def assert_same(actual: NetworkHeads, expected: NetworkHeads) -> None:
    for name, ours, theirs in zip(NetworkHeads._fields, actual, expected, strict=True):
        assert ours.shape == theirs.shape, name
        tolerance = tolerances.EXPORTED * max(1.0, float(theirs.abs().max()))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", CONFIGS)
def test_exportable_model_equals_network(networks: dict[str, DRN], graphs: dict[str, ExportableDRN], name: str) -> None:
    for lengths in ([1], [7], [5, 5], [7, 1, 3, 7, 2], [*range(1, 13)], [*range(12, 0, -1)]):
        inputs = random_inputs(CONFIGS[name], lengths)
        assert_same(answers(graphs[name], inputs), answers(networks[name], inputs))


@pytest.mark.parametrize("name", CONFIGS)
def test_test_network_outputs_depend_on_every_input(networks: dict[str, DRN], name: str) -> None:
    inputs = random_inputs(CONFIGS[name], [4, 6])
    expected = answers(networks[name], inputs)
    assert all(output.std() > 0.05 for output in expected)
    other = random_inputs(CONFIGS[name], [4, 6], seed=1)
    for index in (0, 2, 3):
        changed = answers(networks[name], (*inputs[:index], other[index], *inputs[index + 1 :]))
        assert all((ours - theirs).abs().max() > 0.01 for ours, theirs in zip(changed, expected, strict=True)), index


def test_batch_equals_single_queries(graphs: dict[str, ExportableDRN]) -> None:
    lengths = [3, 9, 1, 5]
    inputs = random_inputs(CONFIGS["tiny"], lengths)
    together = answers(graphs["tiny"], inputs)
    for row, length in enumerate(lengths):
        tokens, *others = (values[row : row + 1] for values in inputs)
        alone = answers(graphs["tiny"], (tokens[:, :length], *others))
        assert_same(alone, NetworkHeads(*(output[row : row + 1] for output in together)))


def test_batch_order_does_not_change_outputs(graphs: dict[str, ExportableDRN]) -> None:
    inputs = random_inputs(CONFIGS["tiny"], [3, 9, 1, 5, 5])
    order = torch.tensor([4, 2, 0, 3, 1])
    shuffled = answers(graphs["tiny"], tuple(values[order] for values in inputs))
    assert_same(shuffled, NetworkHeads(*(output[order] for output in answers(graphs["tiny"], inputs))))


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_tokens_do_not_change_outputs(graphs: dict[str, ExportableDRN], name: str) -> None:
    lengths = [3, 6, 1]
    tokens, *others = random_inputs(CONFIGS[name], lengths, longest=9)
    expected = answers(graphs[name], (tokens, *others))
    past = torch.arange(9) >= others[0][:, None]
    rubbish = tokens.masked_fill(past, 17)
    for ours, theirs in zip(answers(graphs[name], (rubbish, *others)), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_padding_tokens_get_no_attention_weight() -> None:
    """The query has one word with a strongly negative score."""
    model = lively(CONFIGS["tiny"])
    with torch.no_grad():
        model.query_encoder.W1.weight.mul_(400)
    inputs = random_inputs(CONFIGS["tiny"], [1] * 8, longest=12)
    assert_same(answers(ExportableDRN(model), inputs), answers(model, inputs))


def test_wrapping_keeps_the_network_unchanged(networks: dict[str, DRN]) -> None:
    model = networks["tiny"]
    before = {name: values.clone() for name, values in model.state_dict().items()}
    graph = ExportableDRN(model)
    with torch.no_grad():
        for values in (*graph.parameters(), *graph.buffers()):
            values.zero_()
    for name, values in model.state_dict().items():
        assert torch.equal(values, before[name]), name
    assert all(parameter.requires_grad for parameter in model.parameters())
