"""Test `runtime.core.terminal`: output has no control characters and no encoding errors."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from runtime.core.terminal import Formatter, argument, escape_drawing, escape_results, protected_streams, shell_words

# All bytes that an argument of a process can contain.
words = st.binary(max_size=40).map(lambda value: os.fsdecode(value.replace(b"\0", b"")))


def controls(text: str) -> list[str]:
    return [c for c in text if (ord(c) < 32 and c not in "\t\n") or 127 <= ord(c) < 160]


@given(st.recursive(st.text() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
@example("a\x7fb")
def test_escaped_json_results_parse_to_same_value(value: object) -> None:
    assert json.loads(escape_results(json.dumps(value))) == value


def test_escape_drawing_keeps_only_progress_bar_sequences() -> None:
    bar = "\rgrounding:  50%\x1b[A\x1b[36m|\x1b[0m"
    assert escape_drawing(bar) == bar
    assert escape_drawing("\x1b]0;title\x07\x1b[2J\x9b") == "\\x1b]0;title\\x07\\x1b[2J\\x9b"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
@given(text=st.text())
def test_every_text_can_be_printed_in_every_encoding(encoding: str, text: str) -> None:
    raw = io.BytesIO()
    before = sys.stdout, sys.stderr
    sys.stdout = sys.stderr = io.TextIOWrapper(raw, encoding)
    try:
        with protected_streams() as no_colors:
            no_colors()
            print(text, "█▒·“…”", "\udcff")
            sys.stdout.flush()
    finally:
        sys.stdout, sys.stderr = before
    printed = raw.getvalue().decode(encoding)
    assert not controls(printed)
    assert printed.endswith(" \\udcff\n")
    if encoding == "ascii" and text.isascii() and text.isprintable():
        assert printed == f'{text} #=."..." \\udcff\n'


@given(st.lists(words, min_size=1, max_size=4))
def test_shell_words_are_printable_and_read_back_by_bash(values: list[str]) -> None:
    line = shell_words(values)
    assert not controls(line)
    assert "\n" not in line
    assert "\t" not in line
    line.encode()


@pytest.mark.parametrize(
    "value", ["a 'b'", "a\x1b[31mb", "line\nbreak", "it's \\ \x7f", os.fsdecode(b"caf\xe9.mp4"), "é ß"]
)
def test_escaped_shell_word_reads_back(value: str) -> None:
    script = f"printf %s {shell_words([value])}"
    read = subprocess.run(["bash", "-c", script], capture_output=True, check=True)
    assert read.stdout == os.fsencode(value)


def test_log_values_cannot_add_lines_or_sequences() -> None:
    values = ("clip\nerror: all is lost\x1b[2J", Path("a\nb"), ValueError("c\nd"), 3)
    record = logging.LogRecord("drn", logging.INFO, "x.py", 1, "\nNext: %s %s %s %d", values, None)
    assert Formatter("%(message)s").format(record) == "\nNext: clip\\nerror: all is lost\\x1b[2J a\\nb c\\nd 3"


@given(words)
def test_argument_is_bounded_printable_and_stable(word: str) -> None:
    shown = argument(word * 50)
    assert len(shown) <= 300
    assert not controls(shown)
    assert argument(shown) == shown


def test_ordinary_argument_is_unchanged() -> None:
    for word in ("--query", "person's “door”", "a\\b"):
        assert argument(word) == word
