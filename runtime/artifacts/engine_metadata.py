"""Read and check the metadata file (sidecar) of a TensorRT plan, a JSON file with digests of both."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from runtime.artifacts import extractor_manifest
from runtime.artifacts.engine_layers import VERDICTS
from runtime.artifacts.extractor_manifest import ExtractorManifest
from runtime.artifacts.manifest import Manifest
from runtime.core.errors import ModelFileError, as_sentence, excerpt, printable_line
from runtime.core.io.digests import json_digest, sha256
from runtime.core.io.input_files import read_json
from runtime.core.io.text_files import check_format

FORMAT = "drn-engine/1"
Check = Callable[[Any], bool]


@dataclasses.dataclass(frozen=True)
class EngineMetadata:
    """The content of an engine's metadata file.

    Attributes:
        content: all keys of the file: `library`, `target`, `gpu`, `profiles`, `options`, `sha256`, `census` (layers by
            data type) and `unrolled` (names and digests of the plans for short queries).
    """

    manifest: Manifest | ExtractorManifest
    content: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Sidecar(EngineMetadata):
    """The content of the metadata file of a model's engine."""

    manifest: Manifest


def metadata_path(plan: str | os.PathLike[str]) -> Path:
    """Return the path of the sidecar of a plan."""
    plan = Path(plan)
    return plan.with_name(f"{plan.name}.json")


def with_digest(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a sidecar with a `digest` of all other keys, as `read_verified` requires."""
    rest = _without_digest(content)
    return {**rest, "digest": json_digest(rest)}


def read_sidecar(plan: str | os.PathLike[str]) -> Sidecar:
    """Return the checked sidecar of the plan of a model.

    Raises:
        ModelFileError: see `read_verified`, or the plan is that of an extractor (code `wrong_model_kind`).
    """
    content = read_verified(plan)
    if content["manifest"].get("format") == extractor_manifest.FORMAT:
        raise extractor_manifest.no_model(Path(plan))
    return Sidecar(Manifest.from_dict(content["manifest"], str(metadata_path(plan))), content)


def read_verified(plan: str | os.PathLike[str]) -> Mapping[str, Any]:
    """Return the content of the sidecar of a plan after checking the digests of both.

    A plan is code: it must not be deserialized unless this function returns.

    Raises:
        ModelFileError: the sidecar is missing, of another format, edited or damaged, or belongs to another plan.
    """
    plan, path = Path(plan), metadata_path(plan)
    if not path.exists():
        raise ModelFileError(
            f"The sidecar {path} of {plan.name} does not exist. Copy it from the directory of the build, or build both "
            "again with `python -m export.build_engine`.",
            code="missing_file",
        )
    content = read_json(path, "sidecar of an engine", ModelFileError)
    check_format(content, FORMAT, f"{path}", ModelFileError, ADVICE)
    if content.get("digest") != json_digest(_without_digest(content)):
        raise ModelFileError(
            f"{path} does not match its digest, because it was edited or damaged. {as_sentence(ADVICE)}",
            code="digest_mismatch",
        )
    _check_fields(content, path)
    expected, actual = content["sha256"].get(plan.name), sha256(plan)
    if expected != actual:
        raise ModelFileError(
            f"{plan}: expected the SHA-256 {printable_line(str(expected)[:12])}… of its sidecar, got {actual[:12]}…. "
            f"{as_sentence(ADVICE)}",
            code="digest_mismatch",
        )
    return content


ADVICE = "build the engine again with `python -m export.build_engine`"


def _without_digest(content: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name != "digest"}


def _check_fields(content: Mapping[str, Any], path: Path) -> None:
    """Raise ModelFileError (code `damaged_file`) unless every field has the expected type."""
    for name, (expected, is_valid, required) in _FIELDS.items():
        value = content.get(name)
        if (name in content or required) and not is_valid(value):
            raise ModelFileError(
                f"{path} is damaged: expected {expected} for {excerpt(name)}, got {excerpt(value)[:60]}. "
                f"{as_sentence(ADVICE)}",
                code="damaged_file",
            )


def _is(*kinds: type) -> Check:
    return lambda value: isinstance(value, kinds)


def _is_list_of(is_entry: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(is_entry, value))


def _is_table_of(is_entry: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(is_entry, value.values()))


def _is_sibling(name: str) -> bool:
    return name.endswith(".engine") and not {"/", "\\", "\0"}.intersection(name)


def _is_profile(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return False
    ranges = [value.get(name, []) for name in ("batch", "query_length")]
    return all(_is_list_of(lambda size: type(size) is int)(sizes) and len(sizes) == 3 for sizes in ranges)


def _is_layer_stats(value: Any) -> bool:
    """Return whether a value has the shares of the graph, the layers of the engine if inspected, and a verdict."""
    if not isinstance(value, dict) or not isinstance(value.get("twin", {}), dict):
        return False
    if not _is_table_of(_is(int, float))(value.get("twin", {}).get("shares", {})):
        return False
    if "verdict" in value and not (value["verdict"] in VERDICTS and isinstance(value.get("reason"), str)):
        return False
    engine = value.get("engine") or {"layers": {}, "quantised_inputs": {}}
    return (
        isinstance(engine, dict)
        and all(_is_table_of(_is(int))(engine.get(name)) for name in ("layers", "quantised_inputs"))
        and _is_table_of(_is(int))(engine.get("arithmetic", {}))
    )


# Field to a description of its values, a function that checks a value, and whether the field is required.
_FIELDS: dict[str, tuple[str, Check, bool]] = {
    "manifest": ("a table", _is(dict), True),
    "sha256": ("a table of file names and hashes", _is_table_of(_is(str)), True),
    "library": ("a name and a version", _is(str), True),
    "target": ("a name", _is(str), False),
    "gpu": ("a line of text, or null", _is(str, type(None)), False),
    "compute_capabilities": ('a list of texts as "9.0"', _is_list_of(_is(str)), False),
    "profiles": (
        "a list of profiles, each with a name and three whole numbers for batch and for query_length",
        _is_list_of(_is_profile),
        True,
    ),
    "options": ("a table", _is(dict), False),
    "unrolled": (
        "a table of hashes by names of engines in the same directory",
        lambda value: _is_table_of(_is(str))(value) and all(map(_is_sibling, value)),
        False,
    ),
    "census": ("a table of the shares of the graph and the layers of the engine", _is_layer_stats, False),
}
