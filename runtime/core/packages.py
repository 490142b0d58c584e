"""Read the versions of installed Python packages."""

from __future__ import annotations

import importlib.metadata


def installed_version(package: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
