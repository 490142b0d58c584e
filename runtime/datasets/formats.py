"""Open a data set in any published format; the files in its directory determine the format."""

from __future__ import annotations

from pathlib import Path

from runtime.core.errors import AnnotationError, excerpt
from runtime.datasets.caption_json import Entries, activitynet, read_splits, tacos
from runtime.datasets.charades_sta import CharadesSTA
from runtime.datasets.qvhighlights import QVHighlights
from runtime.datasets.schema import Annotation, DatasetFormat, Row

__all__ = ["Annotation", "DatasetFormat", "Row", "open_format"]


def open_format(root: Path) -> DatasetFormat:
    """Return the data set in a directory."""
    claims = {"Charades-STA": CharadesSTA.claims(root), "QVHighlights": QVHighlights.claims(root)}
    captions = read_splits(root)
    for split, entries in captions.items():
        path = root / f"{split}.json"
        claims.setdefault(_kind(entries, path), []).append(path)
    claims = {kind: paths for kind, paths in claims.items() if paths}
    if len(claims) > 1:
        names = " and ".join(f"{paths[0].name} ({kind})" for kind, paths in claims.items())
        raise AnnotationError(
            f"Expected one data set in {root}, got {names}. Use one directory for each data set.", code="mixed_formats"
        )
    if not claims:
        raise AnnotationError(
            f"{root} has no Charades_sta_SPLIT.txt, SPLIT.json or SPLIT.jsonl, with SPLIT train, val or test. See "
            "docs/formats.md for the formats.",
            code="data_set_missing",
        )
    kind = next(iter(claims))
    if kind == "QVHighlights":
        return QVHighlights(root)
    if kind == "Charades-STA":
        return CharadesSTA(root)
    return tacos(root, captions) if kind == "TACoS" else activitynet(root, captions)


def _kind(entries: Entries, path: Path) -> str:
    """Return the format of a file SPLIT.json by its first entry."""
    entry = next(iter(entries.values()))
    has_duration, has_frames = "duration" in entry, "fps" in entry and "num_frames" in entry
    if has_duration != has_frames:
        return "TACoS" if has_frames else "ActivityNet Captions"
    raise AnnotationError(
        f"{path}: expected videos with a duration (ActivityNet Captions) or with fps and num_frames (TACoS), got "
        f"{excerpt(list(entry))[:80]}. See docs/formats.md for the formats.",
        code="unknown_format",
    )
