"""Test `runtime.core.model_argument`: the model file as --model, under its former name, or as the first argument."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
import tyro

from runtime.core import command_list
from runtime.core.model_argument import model_parameter, normalized
from tests.contract_recorder import command_function


def run(model: Path, *, data: Path | None = None) -> None:
    """Print the options."""
    print(f"{model.name}, {data}")


def export(checkpoint: Path, *, output: Path | None = None) -> None:
    """Print the options."""
    print(f"{checkpoint.name}, {output}")


def quantize(onnx_file: Path) -> None:
    """Print the option."""
    print(onnx_file.name)


def describe(model: Annotated[Path, tyro.conf.Positional], *, json: bool = False) -> None:
    """Print the options."""
    print(f"{model.name}, {json}")


@pytest.mark.parametrize(
    ("function", "expected", "lines"),
    [
        (run, "a.onnx, d\n", ["--model a.onnx --data d", "a.onnx --data d", "--data d --model=a.onnx"]),
        (run, "a.onnx, None\n", ["--model a.onnx", "a.onnx"]),
        (export, "a.pt, o\n", ["--model a.pt --output o", "--checkpoint a.pt --output o", "a.pt --output o"]),
        (export, "a.pt, o\n", ["--output o --checkpoint=a.pt", "--output=o --model=a.pt"]),
        (quantize, "a.onnx\n", ["--onnx-file a.onnx", "--onnx_file a.onnx", "--model a.onnx", "a.onnx"]),
        (describe, "a.onnx, True\n", ["a.onnx --json", "--json --model a.onnx", "--model=a.onnx --json"]),
    ],
)  # fmt: skip
def test_every_form_of_the_model_is_equivalent(
    function: Callable[..., Any], expected: str, lines: list[str], run_command: Any
) -> None:
    for line in lines:
        assert run_command(function, *line.split()).out == expected, line


@pytest.mark.parametrize(
    ("function", "line"),
    [
        (run, "a.onnx --model b.onnx"),
        (run, "--checkpoint a.onnx"),
        (run, "--model"),
        (run, "--data d a.onnx"),
        (describe, "a.onnx --model b.onnx"),
        (describe, "--model"),
    ],
)
def test_two_or_no_models_exit_2(function: Callable[..., Any], line: str, run_command: Any) -> None:
    run_command(function, *line.split(), code=2)


def test_help_names_the_model_option_only(run_command: Any) -> None:
    text = run_command(export, "--help").out
    assert "--model" in text
    assert "--checkpoint" not in text


@pytest.mark.parametrize("module", command_list.MODULES.values())
def test_every_model_command_accepts_the_model_option(module: str) -> None:
    function = command_function(module)
    name = model_parameter(inspect.signature(function).parameters)
    former = {"checkpoint", "onnx", "model"} & set(inspect.signature(function).parameters)
    assert (name is not None) == (bool(former) and module != "export.verify")
    if name is not None:
        forms = {tuple(normalized(function, words)) for words in (["a"], ["--model", "a"], [f"--{name}=a"])}
        assert forms in ({("a",)}, {("--model", "a"), ("--model=a",)})


def test_commands_that_compare_models_are_unchanged() -> None:
    verify = command_function("export.verify")
    assert normalized(verify, ["--reference", "a", "--model", "b"]) == ["--reference", "a", "--model", "b"]
    assert normalized(verify, ["a"]) == ["a"]
    assert normalized(command_function("runtime.benchmarking.compare"), ["a", "b"]) == ["a", "b"]
