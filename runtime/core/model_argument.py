"""Accept the model file of every command as `--model FILE`, or as the first argument."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

OPTION = "model"
# Parameters that version 0.1 named differently.
_FORMER_NAMES = ("checkpoint", "onnx", "onnx_file")


def model_parameter(parameters: Mapping[str, inspect.Parameter]) -> str | None:
    """Return the name of the parameter of a command's model file; None if the command compares several models."""
    names = [name for name in (OPTION, *_FORMER_NAMES) if name in parameters]
    return names[0] if len(names) == 1 and "reference" not in parameters else None


def is_positional(parameter: inspect.Parameter, hint: Any) -> bool:
    """Return whether a parameter is given without the name of an option; `hint` is its type with annotations."""
    import tyro

    return parameter.kind is inspect.Parameter.POSITIONAL_ONLY or tyro.conf.Positional in typing.get_args(hint)[1:]


def normalized(function: Callable[..., Any], words: Sequence[str]) -> list[str]:
    """Return the arguments of a command with its model as tyro expects it.

    `--model FILE`, the name of the parameter in version 0.1 (`--checkpoint FILE`), and FILE as the first argument are
    equivalent. The result contains `--model FILE`, or FILE first if the parameter is positional.
    """
    parameters = inspect.signature(function).parameters
    name = model_parameter(parameters)
    if name is None:
        return list(words)
    spellings = {f"--{spelling}" for given in (OPTION, name) for spelling in (given, given.replace("_", "-"))}
    renamed = []
    for word in words:
        option, separator, value = word.partition("=")
        renamed.append(f"--{OPTION}{separator}{value}" if option in spellings else word)
    hints = typing.get_type_hints(function, include_extras=True)
    positional = [key for key, parameter in parameters.items() if is_positional(parameter, hints[key])]
    if name in positional:
        return _model_first(renamed)
    given = any(word.partition("=")[0] == f"--{OPTION}" for word in renamed)
    if given or positional or not words or words[0].startswith("-"):
        return renamed
    return [f"--{OPTION}", *renamed]


def _model_first(words: list[str]) -> list[str]:
    """Return arguments with the value of --model, if given, moved to the front, without the name of the option."""
    for index, word in enumerate(words):
        option, separator, value = word.partition("=")
        if option == f"--{OPTION}":
            after = index + 1 if separator else index + 2
            model = [value] if separator else words[index + 1 : after]
            return [*model, *words[:index], *words[after:]]
    return words
