"""`python -m runtime.grounding.words`: list or search the words that a model knows."""

from __future__ import annotations

import json
import shutil
import textwrap
from pathlib import Path
from typing import Annotated, Any

import tyro

from runtime.backends.model_manifest import read_manifest
from runtime.core.cli import command, suggest_next_command


def words(
    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")],
    prefix: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[PREFIX]")] = "",
    *,
    json_output: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> dict[str, Any]:
    """List the words that a model knows, or those with a prefix; if there are none, print words of similar spelling.

    Example:
        python -m runtime.grounding.words drn.onnx open

    Args:
        model: .onnx, .engine or .pt file.
        prefix: first letters of the words, in upper or lower case. Default: list all words.
        json_output: print the words as JSON.
    """
    vocabulary = read_manifest(model).vocabulary
    listed = vocabulary.starting_with(prefix)
    similar = [] if listed else vocabulary.near(prefix)
    result = {"model": model.name, "prefix": prefix, "count": len(listed), "words": listed, "similar": similar}
    print(json.dumps(result, indent=2) if json_output else _text(result, len(vocabulary)))
    query = ("--data", "DIR", "--video", "NAME", "--query", "a sentence")
    suggest_next_command("runtime.infer", "--model", model, *query)
    return result


def _text(result: dict[str, Any], total: int) -> str:
    width = shutil.get_terminal_size((100, 24)).columns
    lines = textwrap.wrap("  ".join(result["words"]), width, break_long_words=False, break_on_hyphens=False)
    if not result["prefix"]:
        return "\n".join([*lines, f"{total} words."])
    lines.append(f"{result['count']} of {total} words start with {result['prefix']!r}.")
    if result["similar"]:
        lines.append(f"Similar words: {', '.join(result['similar'])}.")
    return "\n".join(lines)


if __name__ == "__main__":
    command(words)
