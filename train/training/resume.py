"""Compare the settings of a recorded run with those of the run that resumes it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any


def extended_stage(recorded: Any, requested: Mapping[str, Any]) -> int | None:
    """Return the first stage that gets more epochs, if two runs differ in nothing else; None if they do."""
    try:
        before = json.loads(json.dumps(recorded))
        pairs = list(zip(before["settings"]["stages"], requested["settings"]["stages"], strict=True))
        longer = [new["number"] for old, new in pairs if new["epochs"] > old["epochs"]]
        for old, new in pairs:
            old["epochs"] = max(old["epochs"], new["epochs"])
    except (KeyError, TypeError, ValueError):
        return None
    return longer[0] if longer and before == requested else None


def first_difference(recorded: Any, requested: Any) -> str:
    """Name the first setting in which two runs differ, other than more epochs, if there is one."""
    differences = list(_differences(recorded, requested))
    return next((text for text, longer in differences if not longer), differences[0][0])


def _differences(recorded: Any, requested: Any, name: str = "") -> Iterator[tuple[str, bool]]:
    """Yield each setting in which two runs differ, and whether it is that a stage has more epochs."""
    if recorded == requested:
        return
    lists = isinstance(recorded, list) and isinstance(requested, list) and len(recorded) == len(requested)
    if lists and all(isinstance(item, dict) for item in (*recorded, *requested)):
        for old, new in zip(recorded, requested, strict=True):
            number = new.get("number")
            for text, longer in _differences(old, new, name):
                yield (f"stage {number}: {text}" if number else text), longer
        return
    if isinstance(recorded, dict) and isinstance(requested, dict):
        for key in {**recorded, **requested}:
            yield from _differences(recorded.get(key), requested.get(key), key)
        return
    longer = name == "epochs" and isinstance(recorded, int) and isinstance(requested, int) and requested > recorded
    yield f"{name} was {str(recorded)[:60]}, is now {str(requested)[:60]}", longer
