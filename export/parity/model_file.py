"""Describe a model file of a parity report: path, hash, size and manifest."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from runtime.artifacts.manifest import Manifest
from runtime.core.io.digests import sha256


@dataclasses.dataclass(frozen=True)
class ModelFile:
    """A model file at the time of the comparison.

    Attributes:
        path: path of the file.
        sha256: SHA-256 of its content.
        size: size in bytes.
        manifest: manifest of the model.
    """

    path: Path
    sha256: str
    size: int
    manifest: Manifest

    @classmethod
    def of(cls, path: Path, manifest: Manifest) -> ModelFile:
        """Read size and hash of a file."""
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
    """Return whether `other` and the reference have a common source by SHA-256, and a sentence that states it."""
    sources = other.manifest.sources
    if reference.sha256 == other.sha256:
        return True, f"{reference.path.name} and {other.path.name} are the same file."
    if reference.sha256 in sources.values():
        return True, f"The manifest of {other.path.name} contains the SHA-256 of {reference.path.name}."
    shared = [name for name, digest in sources.items() if digest in reference.manifest.sources.values()]
    if shared:
        return True, f"Both manifests contain the SHA-256 of {', '.join(shared)}."
    return False, f"{other.path.name} and {reference.path.name} have no common source by SHA-256."
