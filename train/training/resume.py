"""Compare the settings of a recorded run with those of the run that resumes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from runtime.core.differences import differences


def extended_stage(recorded: Any, requested: Mapping[str, Any]) -> int | None:
    """Return the number of the first stage, 1 to 3, that gets more epochs.

    None if the runs are equal, or differ in anything else. See `first_difference` for the arguments.
    """
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
    """Describe the first setting in which two runs differ; more epochs only if nothing else differs.

    Args:
        recorded: content of the `run.json` of the existing run.
        requested: the same values for the new run.
    """
    changes = list(differences(recorded, requested))
    extended = [
        path[-1:] == ("epochs",) and isinstance(before, int) and isinstance(after, int) and after > before
        for path, before, after in changes
    ]
    path, before, after = changes[extended.index(False) if False in extended else 0]
    stage = ""
    if len(path) > 2 and path[:2] == ("settings", "stages"):
        stage = f"stage {requested['settings']['stages'][path[2]].get('number')}: "
    return f"{stage}{path[-1] if path else 'everything'} was {str(before)[:60]}, is now {str(after)[:60]}"
