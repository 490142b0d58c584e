"""Word vectors in the usual text file of GloVe; read without torch, so that data sets are prepared without it too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from runtime.errors import CheckpointError, GroundingError


def glove_vectors(path: Path, words: Mapping[str, int], width: int) -> dict[int, np.ndarray]:
    """Return the vectors of `words` in the usual text file of GloVe, by word id.

    Raises:
        CheckpointError: the file cannot be read, or a line is not a word and `width` numbers.
        GroundingError: there is a vector for none of the words.
    """
    rows: dict[int, np.ndarray] = {}
    try:
        with open(path, encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                # Some GloVe words hold spaces, so the vector is counted from the end.
                fields = line.rstrip("\n").rsplit(" ", width)
                if len(fields) != width + 1:
                    raise CheckpointError(
                        f"{path}, line {number}: a word and {width} numbers are expected, as wide as the embedding."
                    )
                if fields[0] in words:
                    rows[words[fields[0]]] = np.array(fields[1:], np.float32)
    except OSError as error:
        raise CheckpointError(f"The word vectors {path} cannot be read: {error.strerror}.") from error
    except (UnicodeDecodeError, ValueError) as error:
        raise CheckpointError(f"{path} should be GloVe text and cannot be read: {error}.") from error
    if not rows:
        raise GroundingError(
            f"{path} has no vector for any of the {len(words)} words; check that it is the right file."
        )
    return rows
