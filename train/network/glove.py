"""Read word vectors from GloVe text files, without torch, so that data sets can be prepared without it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from runtime.core.errors import CheckpointError, GroundingError, excerpt, reading

log = logging.getLogger("drn")

# Characters per line; a word and 300 numbers take about 3,000.
MAX_LINE = 1 << 20
# The largest magnitude in the authors' glove_weights is 2.96. Far larger values make training diverge.
MAX_MAGNITUDE = 1e4


def glove_vectors(path: Path, words: Mapping[str, int], width: int) -> dict[int, np.ndarray]:
    """Return the vectors of a GloVe text file, one word and its vector per line.

    Args:
        words: word to id; other words of the file are skipped.
        width: values per vector.

    Returns:
        Word id to (width,) float32, from the first line of each word. Further lines with other vectors are a warning.

    Raises:
        CheckpointError: the file cannot be read, a line is not a word and `width` numbers, or a vector is zero or
            contains an impossible value; see `check_vector`.
        GroundingError: no word has a vector.
    """
    rows: dict[int, np.ndarray] = {}
    if Path(path).is_dir():
        raise CheckpointError(f"--glove {path} is a directory. Pass a file.", code="not_a_file")
    blank, repeated = 0, list[tuple[str, int]]()
    with (
        reading(path, "GloVe text", CheckpointError, "check the file"),
        # Only line feeds end a line: words of the published files contain U+0085 and others.
        open(path, encoding="utf-8-sig", newline="\n") as stream,
    ):
        for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE), ""), 1):
            if not line.strip():
                blank = blank or number
                continue
            # Some GloVe words contain spaces, so the vector is split off from the end.
            fields = line.rstrip("\r\n").rsplit(" ", width)
            if len(fields) != width + 1 or blank:
                raise CheckpointError(
                    f"{path}, line {blank or number}: expected a word and {width} numbers. Pass vectors of the width "
                    "of the embedding, or change --embed-dim.",
                    code="word_vector_width_mismatch",
                )
            if fields[0] in words:
                vector = _vector(fields, f"{path}, line {number}")
                if not np.array_equal(rows.setdefault(words[fields[0]], vector), vector):
                    repeated.append((fields[0], number))
    if repeated:
        log.warning(
            "%s has several vectors for %d of the words (%s on line %d, for example). The first of each is used.",
            path, len({word for word, _ in repeated}), excerpt(repeated[0][0]), repeated[0][1],
            extra={"code": "duplicate_word_vector"},
        )  # fmt: skip
    if not rows:
        raise GroundingError(
            f"{path} has no vector for any of the {len(words)} words. Check that it is the right file.",
            code="word_vectors_missing",
        )
    return rows


def check_vector(vector: np.ndarray, subject: str, texts: Sequence[str] = ()) -> None:
    """Check that the values of a word vector are possible.

    Args:
        vector: (D,) float32 word vector.
        subject: the file, and the line or the row, for messages.
        texts: the values as they are in the file, if it is text.

    Raises:
        CheckpointError: a value is not finite (code `word_vector_not_finite`) or beyond `MAX_MAGNITUDE`
            (`word_vector_out_of_range`).
    """
    bad = ~(np.abs(vector) <= MAX_MAGNITUDE)
    if not bad.any():
        return
    index = int(np.argmax(bad))
    finite = bool(np.isfinite(vector[index]))
    value = excerpt(texts[index]) if texts else f"{vector[index]:g}"
    expected = f"values of at most {MAX_MAGNITUDE:g} in magnitude" if finite else "finite values"
    raise CheckpointError(
        f"{subject}: expected {expected}, got {value}. Correct the value, or use another file of word vectors.",
        code="word_vector_out_of_range" if finite else "word_vector_not_finite",
    )


def _vector(fields: Sequence[str], location: str) -> np.ndarray:
    """Return the vector of a line as float32; the first field is the word."""
    with np.errstate(over="ignore"):
        try:
            vector = np.array(fields[1:], np.float32)
        except ValueError:
            vector = np.array([_number(text) for text in fields[1:]], np.float32)
    subject = f"{location}, vector of {excerpt(fields[0])}"
    check_vector(vector, subject, fields[1:])
    if not vector.any():
        raise CheckpointError(
            f"{subject}: all {len(vector)} values are {excerpt(fields[1])}, the vector of padding. Remove the line, or "
            "use another file of word vectors.",
            code="word_vector_zero",
        )
    return vector


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return np.nan
