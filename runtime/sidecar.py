"""The JSON beside a TensorRT plan: what the plan is, and the hash that vouches for it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.errors import ModelFileError
from runtime.files import read_json, sha256
from runtime.manifest import Manifest

FORMAT = "drn-engine/1"


@dataclasses.dataclass(frozen=True)
class Sidecar:
    """What a plan's sidecar says.

    Attributes:
        manifest: of the model.
        content: everything else: `library`, `target`, `gpu`, `profiles`, `options`, `census`, `sha256`.
    """

    manifest: Manifest
    content: Mapping[str, Any]


def path_beside(plan: str | os.PathLike[str]) -> Path:
    """Return where the sidecar of a plan is."""
    plan = Path(plan)
    return plan.with_name(f"{plan.name}.json")


def read_sidecar(plan: str | os.PathLike[str]) -> Sidecar:
    """Return the sidecar of a plan, after checking that it vouches for that very file.

    A plan is code: it must not be deserialised unless this returns.

    Raises:
        ModelFileError: there is no sidecar, it is of another version or damaged, or the plan is not the one it was
            written for.
    """
    plan = Path(plan)
    content = read_json(path_beside(plan), "sidecar of an engine", ModelFileError)
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise ModelFileError(
            f"{path_beside(plan)} is of format {found!r} and this version reads {FORMAT!r}; build the engine again."
        )
    hashes = content.get("sha256")
    vouched = hashes.get(plan.name) if isinstance(hashes, dict) else None
    actual = sha256(plan)
    if vouched != actual:
        raise ModelFileError(
            f"{plan} is not the plan that its sidecar was written for (SHA-256 {actual[:12]}… where "
            f"{str(vouched)[:12]}… is vouched for): it is truncated, was tampered with, or renamed; build it again."
        )
    return Sidecar(Manifest.from_dict(content.get("manifest"), str(path_beside(plan))), content)
