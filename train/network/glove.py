"""Word vectors in the usual text file of GloVe; read without torch, so that data sets are prepared without it too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from runtime.core.errors import CheckpointError, GroundingError, excerpt, reading

# Characters of a line; a word and 300 numbers take about 3,000.
MAX_LINE = 1 << 20
# The largest magnitude in the authors' glove_weights is 2.96. Far larger values make training diverge.
MAX_MAGNITUDE = 1e4


def glove_vectors(path: Path, words: Mapping[str, int], width: int) -> dict[int, np.ndarray]:
    """Return the vectors of `words` in the usual text file of GloVe, by word id.

    Raises:
        CheckpointError: the file cannot be read, a line is not a word and `width` numbers, or the vector of one of
            `words` is zero or holds a value that can be none; see `check_vector`.
        GroundingError: there is a vector for none of the words.
    """
    rows: dict[int, np.ndarray] = {}
    if Path(path).is_dir():
        raise CheckpointError(f"The word vectors {path} are a directory, not a file; check --glove.", code="not_a_file")
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
                    "embedding.",
                    code="word_vector_width_mismatch",
                )
            if fields[0] in words:
                rows[words[fields[0]]] = _vector(fields, f"{path}, line {number}")
    if not rows:
        raise GroundingError(
            f"{path} has no vector for any of the {len(words)} words; check that it is the right file.",
            code="word_vectors_missing",
        )
    return rows


def check_vector(vector: np.ndarray, subject: str, texts: Sequence[str] = ()) -> None:
    """Raise CheckpointError unless all values of a word vector can be some.

    Args:
        vector: (D,) float32.
        subject: begins the message: the file, and the line or the row.
        texts: the values as the file has them, where it is text.

    Raises:
        CheckpointError: a value is not finite (code `word_vector_not_finite`) or beyond `MAX_MAGNITUDE`
            (`word_vector_out_of_range`).
    """
    bad = ~(np.abs(vector) <= MAX_MAGNITUDE)
    if not bad.any():
        return
    index = int(np.argmax(bad))
    finite = bool(np.isfinite(vector[index]))
    problem = f"which is beyond {MAX_MAGNITUDE:g}" if finite else "which is not a finite number"
    raise CheckpointError(
        f"{subject} holds {excerpt(texts[index]) if texts else f'{vector[index]:g}'}, {problem}. Correct the value, or "
        "use another file of word vectors.",
        code="word_vector_out_of_range" if finite else "word_vector_not_finite",
    )


def _vector(fields: Sequence[str], location: str) -> np.ndarray:
    """Return the numbers of a line, whose first field is the word, as float32; CheckpointError if they can be none."""
    with np.errstate(over="ignore"):
        try:
            vector = np.array(fields[1:], np.float32)
        except ValueError:
            vector = np.array([_number(text) for text in fields[1:]], np.float32)
    subject = f"{location}: the vector of {excerpt(fields[0])}"
    check_vector(vector, subject, fields[1:])
    if not vector.any():
        raise CheckpointError(
            f"{subject} holds {excerpt(fields[1])} in all {len(vector)} values, which is that of padding. Remove the "
            "line, or use another file of word vectors.",
            code="word_vector_zero",
        )
    return vector


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return np.nan
