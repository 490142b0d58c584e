"""Build the help of a command from its docstring, with options in named groups."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from runtime.core.command_list import as_typed
from runtime.core.model_argument import OPTION, is_positional, model_parameter

_SECTION = re.compile(r"^(Args|Returns|Raises|Example):$", re.MULTILINE)
_ARGUMENT = re.compile(r"^ {4}(\w+): ", re.MULTILINE)
# Options of these names are listed under the heading of their group; all others are listed first.
_GROUPS: Mapping[str, tuple[str, ...]] = {
    "windows": ("window", "overlap"),
    "quantization": ("table", "plan", "keep", "calib_samples", "calib_method", "calib_videos"),
    "accuracy": ("max_drop", "boundary_p99", "protocol", "parity_split", "limit", "invalid"),
    "engine": (
        "batch", "query_length", "unroll", "videos", "profiles", "optimization_level", "workspace", "timing_cache",
        "version_compatible", "hardware_compatible", "tf32", "compute_capability",
    ),
    "access": ("host", "port", "allow_host", "api_key"),
    "queue": ("wait_ms", "queue_size", "timeout", "grace"),
    "storage": ("cache_mib", "uploads", "upload_mib", "uploads_mib", "keep_minutes"),
    "network": ("num_segments", "embed_dim", "hidden_dim", "fpn_dim", "iou_target"),
    "execution": ("batch_size", "device", "threads", "actors", "address", "shard_pairs"),
}  # fmt: skip
# Minimum number of options for a heading.
_MIN_GROUP = 2


def documented(function: Callable[..., Any]) -> tuple[Callable[..., Callable[[], Any]], str]:
    """Return a function whose signature tyro parses, and the description of a command.

    Args:
        function: the command. Its docstring has a summary, paragraphs, and the sections Example, Args, Returns and
            Raises; Args documents every parameter.

    Returns:
        A function with the options of `function`, which returns the call of `function` with their values; and the text
        to print above the options.
    """
    description, help_texts = _parsed_docstring(as_typed(inspect.getdoc(function) or ""))
    hints = typing.get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters
    grouped = {group: [name for name in names if name in parameters] for group, names in _GROUPS.items()}
    groups = {name: group for group, names in grouped.items() for name in names if len(names) >= _MIN_GROUP}
    model = model_parameter(parameters)
    fields: dict[str, list[Any]] = {group: [] for group in _GROUPS if group in groups.values()}
    top: list[inspect.Parameter] = []
    for name, parameter in parameters.items():
        # A parameter that may be None and has no default must be given in Python, but not on the command line.
        required = parameter.default is inspect.Parameter.empty and type(None) not in typing.get_args(hints[name])
        default = None if not required and parameter.default is inspect.Parameter.empty else parameter.default
        text, option = help_texts.get(name, ""), None
        if name == model and not is_positional(parameter, hints[name]):
            text, option = f"{text} May be the first argument, without --{OPTION}.", OPTION
        hint = _annotated(hints[name], default, text, option)
        if name not in groups:
            # Keywords may follow each other in any order, with and without a default.
            is_keyword = parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
            kind = inspect.Parameter.KEYWORD_ONLY if is_keyword else parameter.kind
            top.append(parameter.replace(annotation=hint, default=default, kind=kind))
            continue
        field = (name, hint) if required else (name, hint, dataclasses.field(default=default))
        fields[groups[name]].append(field)
    for group in fields:
        # Dataclass fields without a default must come first.
        group_type = dataclasses.make_dataclass(group.capitalize(), sorted(fields[group], key=len))
        group_type.__doc__ = ""
        top.append(inspect.Parameter(group, inspect.Parameter.KEYWORD_ONLY, annotation=group_type))

    def later(*values: Any, **named: Any) -> Callable[[], Any]:
        for group in fields:
            named.update(vars(named.pop(group)))
        return functools.partial(function, *values, **named)

    later.__signature__ = inspect.Signature(top)  # type: ignore[attr-defined]
    later.__annotations__ = {parameter.name: parameter.annotation for parameter in top}
    return later, description


def _parsed_docstring(text: str) -> tuple[str, dict[str, str]]:
    """Return the description, with one line per paragraph, and the text of each parameter in one line."""
    before, *sections = _SECTION.split(text)
    contents = dict(zip(sections[::2], sections[1::2]))
    paragraphs = [" ".join(part.split()) for part in before.strip().split("\n\n")]
    if "Example" in contents:
        paragraphs.append(f"example:\n  {contents['Example'].strip()}")
    _, *arguments = _ARGUMENT.split(contents.get("Args", ""))
    help_texts = {name: " ".join(value.split()) for name, value in zip(arguments[::2], arguments[1::2])}
    return "\n\n".join(paragraphs), help_texts


def _annotated(hint: Any, default: Any, text: str, option: str | None) -> Any:
    """Return a type hint with its help text, without "(default: None)" and "(default: )".

    Args:
        default: `inspect.Parameter.empty` if there is none.
        option: name of its option, if it differs from that of the parameter.
    """
    import tyro

    behavior = "" if default in (None, (), "") else None
    if default is inspect.Parameter.empty:
        # tyro gives positional arguments without a default an empty one.
        behavior = "(required)"
    return Annotated[hint, tyro.conf.arg(name=option, help=text, help_behavior_hint=behavior)]
