"""Describe a model file in a parity report: its path, hash, size and manifest."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from runtime.artifacts.manifest import Manifest
from runtime.core.io.digests import sha256


@dataclasses.dataclass(frozen=True)
class ModelFile:
    """A model file as it was when it was judged."""

    path: Path
    sha256: str
    size: int
    manifest: Manifest

    @classmethod
    def of(cls, path: Path, manifest: Manifest) -> ModelFile:
        return cls(path, sha256(path), path.stat().st_size, manifest)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.path.name,
            "sha256": self.sha256,
            "bytes": self.size,
            "precision": self.manifest.precision,
            "stage": self.manifest.stage,
            "sources": dict(self.manifest.sources),
            "producer": dict(self.manifest.producer),
        }


def provenance(reference: ModelFile, other: ModelFile) -> tuple[bool, str]:
    """Return whether `other` is known to share an origin with the reference, and a sentence that says it.

    Names may change; only hashes count.
    """
    theirs = other.manifest.sources
    if reference.sha256 == other.sha256:
        return True, f"{reference.path.name} and {other.path.name} are the same file."
    if reference.sha256 in theirs.values():
        return True, f"{other.path.name} was made from this very {reference.path.name}: it records its hash."
    shared = [name for name, digest in theirs.items() if digest in reference.manifest.sources.values()]
    if shared:
        return True, f"Both come from the same {', '.join(shared)}: they record its hash."
    return False, f"{other.path.name} records no file that {reference.path.name} is or was made from."
