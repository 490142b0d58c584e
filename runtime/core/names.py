"""Compare names of videos that differ in case or Unicode normalization alone."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping

from runtime.core.errors import excerpt


def folded(name: str) -> str:
    """Return what is equal for two names that differ in case or Unicode normalization alone (NFC, NFD)."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def by_fold(names: Iterable[str]) -> dict[str, str]:
    """Return names by what `folded` returns for them, as `near_name` expects."""
    return {folded(name): name for name in names}


def near_name(known: Mapping[str, str], *spellings: str) -> str:
    """Return a sentence, after a space, that names a known name which differs in form alone; empty where there is none.

    macOS stores accents apart from their letters (NFD), where other systems write one character (NFC). Such names look
    alike.

    Args:
        known: from `by_fold`.
        spellings: of a name that is not known.
    """
    for name in spellings:
        other = known.get(folded(name), name)
        if other != name:
            normalized = unicodedata.normalize("NFC", other) == unicodedata.normalize("NFC", name)
            form = "Unicode normalization (NFC, NFD)" if normalized else "case"
            return f" {excerpt(other)} differs from it in {form} alone; rename one of them."
    return ""
