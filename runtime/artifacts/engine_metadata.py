"""The JSON beside a TensorRT plan: what the plan is, and the hashes of both."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from runtime.artifacts import extractor_manifest
from runtime.artifacts.engine_layers import VERDICTS
from runtime.artifacts.manifest import Manifest
from runtime.core.errors import ModelFileError, excerpt, printable_line
from runtime.core.io.digests import json_digest, sha256
from runtime.core.io.input_files import read_json
from runtime.core.io.text_files import check_format

FORMAT = "drn-engine/1"


class ModelMetadata(Protocol):
    """The keys of every manifest in a sidecar, of a model or of an extractor."""

    @property
    def part(self) -> str:
        """Return the kind of inputs and outputs: a key of `runtime.backends.batch_shapes.AXES`."""

    @property
    def precision(self) -> str:
        """Of its weights and arithmetic."""

    @property
    def sources(self) -> Mapping[str, str]:
        """Return the files that the model was built from: name to SHA-256."""


class EngineMetadata(Protocol):
    """A sidecar of any kind of network."""

    @property
    def manifest(self) -> ModelMetadata:
        """Of the network."""

    @property
    def content(self) -> Mapping[str, Any]:
        """Everything else."""


@dataclasses.dataclass(frozen=True)
class Sidecar:
    """The content of a TensorRT engine's metadata file.

    Attributes:
        manifest: of the model.
        content: everything else: `library`, `target`, `gpu`, `profiles`, `options`, `census`, `sha256`, and of a plan
            with others beside it for short queries `unrolled`, their names and hashes.
    """

    manifest: Manifest
    content: Mapping[str, Any]


def metadata_path(plan: str | os.PathLike[str]) -> Path:
    """Return where the sidecar of a plan is."""
    plan = Path(plan)
    return plan.with_name(f"{plan.name}.json")


def with_digest(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a sidecar with the `digest` that `read_sidecar` asks for: of all the rest of it.

    A digest that is there already is replaced.
    """
    rest = _unsealed(content)
    return {**rest, "digest": json_digest(rest)}


def read_sidecar(plan: str | os.PathLike[str]) -> Sidecar:
    """Return the sidecar of a model's plan, checked; ModelFileError as of `read_verified`, or if it is no model's."""
    content = read_verified(plan)
    if content["manifest"].get("format") == extractor_manifest.FORMAT:
        raise extractor_manifest.no_model(Path(plan))
    return Sidecar(Manifest.from_dict(content["manifest"], str(metadata_path(plan))), content)


def read_verified(plan: str | os.PathLike[str]) -> Mapping[str, Any]:
    """Return what the sidecar of a plan says, after checking that it is whole and records the hash of that very file.

    A plan is code: it must not be deserialised unless this returns.

    Raises:
        ModelFileError: there is no sidecar, it is of another version, edited or damaged, or the plan is not the one it
            was written for.
    """
    plan, path = Path(plan), metadata_path(plan)
    if not path.exists():
        raise ModelFileError(
            f"{path}, the sidecar without which an engine is not loaded, does not exist; copy it from where "
            f"{plan.name} was built, or build both again with `python -m export.build_engine`.",
            code="missing_file",
        )
    content = read_json(path, "sidecar of an engine", ModelFileError)
    check_format(content, FORMAT, f"{path}", ModelFileError, _REBUILD.rstrip("."))
    if content.get("digest") != json_digest(_unsealed(content)):
        raise ModelFileError(
            f"{path} does not hash to its own digest, so it was edited or damaged; {_REBUILD}", code="digest_mismatch"
        )
    _check_shapes(content, path)
    vouched, actual = content["sha256"].get(plan.name), sha256(plan)
    if vouched != actual:
        raise ModelFileError(
            f"{plan} is not the plan that its sidecar was written for (SHA-256 {actual[:12]}… where "
            f"{printable_line(str(vouched)[:12])}… is recorded): it is truncated, was tampered with, or renamed; "
            "build it again.",
            code="digest_mismatch",
        )
    return content


_REBUILD = "build the engine again with `python -m export.build_engine`."


def _unsealed(content: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name != "digest"}


def _check_shapes(content: Mapping[str, Any], path: Path) -> None:
    """Raise ModelFileError unless every field is of the kind that its readers take it for."""
    for name, (expected, fits, needed) in _FIELDS.items():
        if name in content and not fits(content[name]):
            raise ModelFileError(
                f"{path} is damaged: {excerpt(name)} should be {expected}; {_REBUILD}", code="damaged_file"
            )
        if needed and name not in content:
            raise ModelFileError(
                f"{path} is damaged: {excerpt(name)} is missing and should be {expected}; {_REBUILD}",
                code="damaged_file",
            )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)


def _is_table_of(kind: type | tuple[type, ...]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(isinstance(entry, kind) for entry in value.values())


def _is_sibling(name: str) -> bool:
    return name.endswith(".engine") and not {"/", "\\", "\0"}.intersection(name)


def _is_range(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(size) is int for size in value)


def _is_profile(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("name"), str)
        and all(_is_range(value.get(name)) for name in ("batch", "query_length"))
    )


def _is_layer_stats(value: Any) -> bool:
    """The shares of the twin, the layers of the engine (none where no GPU counted them), and the verdict over them."""
    if not isinstance(value, dict) or not isinstance(value.get("twin", {}), dict):
        return False
    if not _is_table_of((int, float))(value.get("twin", {}).get("shares", {})):
        return False
    if "verdict" in value and not (value["verdict"] in VERDICTS and isinstance(value.get("reason"), str)):
        return False
    engine = value.get("engine") or {"layers": {}, "quantised_inputs": {}}
    return (
        isinstance(engine, dict)
        and all(_is_table_of(int)(engine.get(name)) for name in ("layers", "quantised_inputs"))
        and _is_table_of(int)(engine.get("arithmetic", {}))
    )


# Field to what it should be in words, whether a value is that, and whether it must be there.
_FIELDS: dict[str, tuple[str, Callable[[Any], bool], bool]] = {
    "manifest": ("a table", _is_table, True),
    "sha256": ("a table of file names and hashes", _is_table_of(str), True),
    "library": ("a name and a version", _is_text, True),
    "target": ("a name", _is_text, False),
    "gpu": ("a line of text, or null", lambda value: value is None or isinstance(value, str), False),
    "compute_capabilities": (
        'a list of texts as "9.0"',
        lambda value: isinstance(value, list) and all(isinstance(entry, str) for entry in value),
        False,
    ),
    "profiles": (
        "a list of profiles, each with a name and three whole numbers for batch and for query_length",
        lambda value: isinstance(value, list) and all(_is_profile(entry) for entry in value),
        True,
    ),
    "options": ("a table", _is_table, False),
    "unrolled": (
        "a table of hashes by names of engines in the same directory",
        lambda value: _is_table_of(str)(value) and all(map(_is_sibling, value)),
        False,
    ),
    "census": ("a table with the shares of the twin and the layers of the engine", _is_layer_stats, False),
}
