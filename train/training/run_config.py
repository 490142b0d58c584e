"""Write the options of a training run to `run.yaml`, and read them back for `--config`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime.core.errors import GroundingError, excerpt, importing, one_line
from runtime.core.io.atomic_files import write_text
from runtime.core.io.text_files import read_text
from train.training.options import TrainingOptions

FILE_NAME = "run.yaml"
# PyYAML takes up to 0.1 s per 1,000 characters of hostile text.
MAX_CHARACTERS = 1 << 14
# A table of lists has 2.
MAX_DEPTH = 4
# Options of a command, not of a run.
COMMAND_OPTIONS = ("config", "resume")


def write_run_config(options: TrainingOptions) -> None:
    """Write the options of a run to OUTPUT/run.yaml, without those that have no value."""
    values = {name: value for name, value in vars(options).items() if value is not None}
    # JSON values are YAML, so that writing does not need PyYAML.
    lines = [
        f"{name}: {json.dumps(value, default=str, ensure_ascii=False)}\n"
        for name, value in values.items()
        if name not in COMMAND_OPTIONS
    ]
    write_text(options.output / FILE_NAME, "".join(lines))


def with_config(arguments: Sequence[str]) -> list[str]:
    """Replace `--config FILE` in a command line by the options of the file that the command line does not give.

    Raises:
        GroundingError: the file cannot be read, or is not a table of options.
        DeviceError: PyYAML is not installed.
    """
    parser = argparse.ArgumentParser(prog="train", add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    known, others = parser.parse_known_args(arguments)
    if known.config is None:
        return list(arguments)
    given = {argument.partition("=")[0].replace("_", "-") for argument in others if argument.startswith("--")}
    flags = []
    for name, value in read_run_config(known.config).items():
        flag = f"--{name.replace('_', '-')}"
        if flag in given or value is None or value is False:
            continue
        if isinstance(value, list):
            flags += [flag, *map(str, value)]
        else:
            flags.append(flag if value is True else f"{flag}={value}")
    return [*others, *flags]


def read_run_config(path: Path) -> dict[str, Any]:
    """Return the options in a YAML file, whose names are those of `train`; see `with_config` for errors."""
    with importing("PyYAML for --config", "train"):
        import yaml
    text = read_text(path, "options of a training run", GroundingError)
    if len(text) > MAX_CHARACTERS:
        raise GroundingError(
            f"{path}: expected at most {MAX_CHARACTERS} characters of options, got {len(text)}. Check --config.",
            code="file_too_large",
        )
    try:
        # Aliases can take exponential time, and nesting takes quadratic time.
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH or isinstance(event, yaml.AliasEvent):
                raise ValueError(f"aliases, and nesting of more than {MAX_DEPTH} levels, are not supported")
        content = yaml.safe_load(text)
    # PyYAML's constructors raise exceptions without a common base class.
    except Exception as error:
        raise GroundingError(
            f"{path}: expected YAML, got text that cannot be read ({one_line(error)}). Correct the file.",
            code="invalid_yaml",
        ) from error
    if not isinstance(content, dict):
        raise GroundingError(
            f"{path}: expected a table of options such as `seed: 1`, got a {type(content).__name__}. Correct the file.",
            code="unexpected_structure",
        )
    names = {field.name for field in dataclasses.fields(TrainingOptions)} - set(COMMAND_OPTIONS)
    options = {str(name).replace("-", "_"): value for name, value in content.items()}
    for name, value in options.items():
        if name not in names:
            raise GroundingError(
                f"{path}: {excerpt(name)} is not an option of a training run. Correct or remove it.",
                code="unexpected_structure",
            )
        items = value if isinstance(value, list) else [value]
        if not all(item is None or isinstance(item, (str, int, float)) for item in items):
            raise GroundingError(
                f"{path}: expected text, a number, a boolean, or a list of these for {name}, got a "
                f"{type(value).__name__}. Correct the value.",
                code="unexpected_structure",
            )
    return options
