"""Published data sets, one module a format, distinguished by the files that are there."""

from __future__ import annotations

from pathlib import Path

from runtime.core.errors import AnnotationError
from runtime.datasets.activitynet import activitynet, is_activitynet
from runtime.datasets.caption_json import Entries, read_splits
from runtime.datasets.charades_sta import CharadesSTA
from runtime.datasets.qvhighlights import QVHighlights
from runtime.datasets.schema import Annotation, DatasetFormat, Row
from runtime.datasets.tacos import is_tacos, tacos

__all__ = ["Annotation", "DatasetFormat", "Row", "open_format"]


def open_format(root: Path) -> DatasetFormat:
    """Return the data set in a directory.

    Raises:
        AnnotationError: the directory holds files of several formats or of none, or one is malformed.
    """
    claims = {"Charades-STA": CharadesSTA.claims(root), "QVHighlights": QVHighlights.claims(root)}
    captions = read_splits(root)
    for split, entries in captions.items():
        path = root / f"{split}.json"
        claims.setdefault(_kind(entries, path), []).append(path)
    results = {kind: paths for kind, paths in claims.items() if paths}
    if len(results) > 1:
        message = " and ".join(f"{paths[0].name} ({kind})" for kind, paths in results.items())
        raise AnnotationError(
            f"{root} holds a mixture of formats, {message}; keep each data set in a directory of its own.",
            code="mixed_formats",
        )
    if not results:
        raise AnnotationError(
            f"{root} holds no data set: Charades_sta_SPLIT.txt (Charades-STA), SPLIT.json (ActivityNet Captions, "
            "TACoS) or SPLIT.jsonl (QVHighlights, or the common form) is looked for, SPLIT being train, val or test; "
            "see docs/formats.md.",
            code="data_set_missing",
        )
    kind = next(iter(results))
    if kind == "QVHighlights":
        return QVHighlights(root)
    if kind == "Charades-STA":
        return CharadesSTA(root)
    return tacos(root, captions) if kind == "TACoS" else activitynet(root, captions)


def _kind(entries: Entries, path: Path) -> str:
    """Return which of the two formats that share a file name a file is of, by its first entry."""
    entry = next(iter(entries.values()))
    if is_tacos(entry) and not is_activitynet(entry):
        return "TACoS"
    if is_activitynet(entry) and not is_tacos(entry):
        return "ActivityNet Captions"
    raise AnnotationError(
        f"{path} is neither ActivityNet Captions, whose videos have a duration, nor TACoS, whose videos have fps and "
        "num_frames; see docs/formats.md.",
        code="unknown_format",
    )
