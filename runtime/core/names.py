"""Suggest known names of videos for unknown ones: equal but for case and Unicode normalization, or similar."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable, Mapping

from runtime.core.errors import excerpt

# Maximum number of characters of an unknown name that are compared.
_MAX_COMPARED_LENGTH = 100


def folded(name: str) -> str:
    """Return a form that is equal for names that differ only in case or Unicode normalization (NFC, NFD)."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def by_fold(names: Iterable[str]) -> dict[str, str]:
    """Return names by their `folded` form, as `near_name` expects."""
    return {folded(name): name for name in names}


def near_name(known: Mapping[str, str], *spellings: str) -> str:
    """Return " " and a sentence that suggests a known name, if one differs only in case or normalization; else "".

    macOS stores accents separately from their letters (NFD), other systems as one character (NFC). Such names look
    the same.
    """
    for name in spellings:
        other = known.get(folded(name), name)
        if other != name:
            normalized = unicodedata.normalize("NFC", other) == unicodedata.normalize("NFC", name)
            form = "Unicode normalization (NFC, NFD)" if normalized else "case"
            return f" {excerpt(other)} is a similar name that differs only in {form}. Use one spelling."
    return ""


def similar_names(known: Iterable[str], name: str) -> str:
    """Return at most three known names of similar spelling, quoted, most similar first; "" if there are none."""
    return ", ".join(map(excerpt, difflib.get_close_matches(name[:_MAX_COMPARED_LENGTH], known, 3)))
