"""Word vectors in the usual text file of GloVe; read without torch, so that data sets are prepared without it too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from runtime.errors import CheckpointError, GroundingError, excerpt


def glove_vectors(path: Path, words: Mapping[str, int], width: int) -> dict[int, np.ndarray]:
    """Return the vectors of `words` in the usual text file of GloVe, by word id.

    Raises:
        CheckpointError: the file cannot be read, or a line is not a word and `width` numbers.
        GroundingError: there is a vector for none of the words.
    """
    rows: dict[int, np.ndarray] = {}
    if Path(path).is_dir():
        raise CheckpointError(f"The word vectors {path} are a directory, not a file; check --glove.")
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
                    with np.errstate(over="ignore"):
                        vector = np.array(fields[1:], np.float32)
                    if not np.isfinite(vector).all():
                        value = next(
                            text for text, entry in zip(fields[1:], vector, strict=True) if not np.isfinite(entry)
                        )
                        raise CheckpointError(
                            f"{path}, line {number}: the vector of {excerpt(fields[0])} holds {excerpt(value)}, which "
                            "is not a finite number; correct or remove the line.",
                            code="word_vector_not_finite",
                        )
                    rows[words[fields[0]]] = vector
    except OSError as error:
        raise CheckpointError(f"The word vectors {path} cannot be read: {error.strerror}; check --glove.") from error
    except (UnicodeDecodeError, ValueError) as error:
        raise CheckpointError(f"{path} should be GloVe text and cannot be read: {error}.") from error
    if not rows:
        raise GroundingError(
            f"{path} has no vector for any of the {len(words)} words; check that it is the right file."
        )
    return rows
