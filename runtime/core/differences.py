"""Compare two JSON values, such as recorded and requested settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Union

Key = Union[str, int]


def differences(before: Any, after: Any, path: tuple[Key, ...] = ()) -> Iterator[tuple[tuple[Key, ...], Any, Any]]:
    """Yield every difference between two JSON values.

    Objects, and lists of equally many objects, are compared entry by entry; other values are compared by ==.

    Args:
        path: keys and indices that lead to the values in a larger one.

    Yields:
        The path of the difference, and the value in `before` and in `after`; None for a missing key.
    """
    if before == after:
        return
    if isinstance(before, dict) and isinstance(after, dict):
        for key in {**before, **after}:
            yield from differences(before.get(key), after.get(key), (*path, key))
    elif (
        isinstance(before, list)
        and isinstance(after, list)
        and len(before) == len(after)
        and all(isinstance(item, dict) for item in (*before, *after))
    ):
        for index, (old, new) in enumerate(zip(before, after)):
            yield from differences(old, new, (*path, index))
    else:
        yield path, before, after
