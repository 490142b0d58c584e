"""Word vectors in the usual text file of GloVe; read without torch, so that data sets are prepared without it too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from runtime.errors import CheckpointError, GroundingError, excerpt, reading

# Characters of a line; a word and 300 numbers take about 3,000.
MAX_LINE = 1 << 20


def glove_vectors(path: Path, words: Mapping[str, int], width: int) -> dict[int, np.ndarray]:
    """Return the vectors of `words` in the usual text file of GloVe, by word id.

    Raises:
        CheckpointError: the file cannot be read, or a line is not a word and `width` numbers.
        GroundingError: there is a vector for none of the words.
    """
    rows: dict[int, np.ndarray] = {}
    if Path(path).is_dir():
        raise CheckpointError(f"The word vectors {path} are a directory, not a file; check --glove.")
    blank = 0
    with (
        reading(path, "GloVe text", CheckpointError, "check the file"),
        # Only line feeds end a line: words of the published files hold U+0085 and others.
        open(path, encoding="utf-8-sig", newline="\n") as stream,
    ):
        for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE), ""), 1):
            if not line.strip():
                blank = blank or number
                continue
            # Some GloVe words hold spaces, so the vector is counted from the end.
            fields = line.rstrip("\r\n").rsplit(" ", width)
            if len(fields) != width + 1 or blank:
                raise CheckpointError(
                    f"{path}, line {blank or number}: a word and {width} numbers are expected, as wide as the "
                    "embedding."
                )
            if fields[0] in words:
                rows[words[fields[0]]] = _vector(fields, f"{path}, line {number}")
    if not rows:
        raise GroundingError(
            f"{path} has no vector for any of the {len(words)} words; check that it is the right file."
        )
    return rows


def _vector(fields: Sequence[str], place: str) -> np.ndarray:
    """Return the numbers of a line, whose first field is the word, as finite float32."""
    with np.errstate(over="ignore"):
        try:
            vector = np.array(fields[1:], np.float32)
        except ValueError:
            vector = np.array([_number(text) for text in fields[1:]], np.float32)
    if not np.isfinite(vector).all():
        value = fields[1 + int(np.argmin(np.isfinite(vector)))]
        raise CheckpointError(
            f"{place}: the vector of {excerpt(fields[0])} holds {excerpt(value)}, which is not a finite number; "
            "correct or remove the line.",
            code="word_vector_not_finite",
        )
    return vector


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return np.nan
