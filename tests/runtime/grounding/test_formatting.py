"""Test `runtime.grounding.formatting`: answers as text, JSON, CSV and SRT."""

from __future__ import annotations

import csv
import io
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.core.moments import Moment
from runtime.grounding.formatting import Answer, format_answers, format_timestamp

ANSWERS = [
    Answer(
        'person says "hi", then\nleaves',
        "3MSZA",
        40.0,
        [Moment(20.0, 30.5, 0.75), Moment(0.0, 10.0, 0.5), Moment(39.5, 40.0, 0.0625)],
        [(20.0, 40.0)],
    ),
    Answer("a dog", "3MSZA", 4000.0, [Moment(1.25, 3661.5, 0.5)]),
    Answer("nothing", "3MSZA", 40.0, []),
]


def test_format_timestamp_uses_clock_notation() -> None:
    expected = {0: "0:00.0", 59.94: "0:59.9", 59.96: "1:00.0", 3599.99: "1:00:00.0", 3723: "1:02:03.0"}
    assert {seconds: format_timestamp(seconds) for seconds in expected} == expected
    assert format_timestamp(59.6, 0) == "1:00"


@given(st.floats(0, 1e6))
def test_format_timestamp_is_accurate_to_half_a_tenth(seconds: float) -> None:
    parts = [float(part) for part in format_timestamp(seconds).split(":")]
    value = sum(part * 60**power for power, part in enumerate(reversed(parts)))
    assert value == pytest.approx(seconds, abs=0.0501)
    assert all(part < 60 for part in parts[1:])


def bars(text: str) -> list[str]:
    return [line.split()[-1] for line in text.splitlines() if set(line.split()[-1]) <= set("·█▒")]


def test_text_bars_mark_the_cells_of_the_moment() -> None:
    (bar,) = bars(format_answers([Answer("q", "v", 20.0, [Moment(5, 10, 1)])], "text", width=20))
    assert bar == "·" * 5 + "█" * 5 + "·" * 10
    actual = bars(format_answers(ANSWERS[:1], "text", width=20))
    assert actual[0] == "·" * 10 + "█" * 5 + "·" * 5
    assert actual[1] == "█" * 5 + "·" * 15
    # A moment that is shorter than a cell is visible.
    assert actual[2] == "·" * 19 + "█"
    assert actual[3] == "·" * 10 + "▒" * 10


@given(st.floats(0, 50), st.floats(0, 50), st.integers(20, 200))
def test_text_bars_have_equal_length_and_mark_a_cell(a: float, b: float, width: int) -> None:
    moments = [Moment(min(a, b), max(a, b), 0.5), Moment(0, 50, 0.4)]
    first, second = bars(format_answers([Answer("q", "v", 50.0, moments)], "text", width))
    assert len(first) == len(second) >= 20
    assert re.fullmatch("·*█+·*", first)
    assert set(second) == {"█"}


def test_text_fits_the_terminal_and_names_times_scores_and_truth() -> None:
    text = format_answers(ANSWERS[1:2], "text", width=100)
    assert all(len(line) <= 100 for line in text.splitlines())
    text = format_answers(ANSWERS[:1], "text", width=100)
    assert "3MSZA (0:40.0)" in text
    assert "0:20.0 - 0:30.5  0.750" in text
    assert "0:20.0 - 0:40.0  truth" in text


def test_json_and_jsonl_have_the_documented_structure() -> None:
    assert json.loads(format_answers(ANSWERS, "json")) == [
        {
            "query": 'person says "hi", then\nleaves',
            "video": "3MSZA",
            "moments": [
                {"start": 20.0, "end": 30.5, "score": 0.75},
                {"start": 0.0, "end": 10.0, "score": 0.5},
                {"start": 39.5, "end": 40.0, "score": 0.0625},
            ],
        },
        {"query": "a dog", "video": "3MSZA", "moments": [{"start": 1.25, "end": 3661.5, "score": 0.5}]},
        {"query": "nothing", "video": "3MSZA", "moments": []},
    ]
    lines = format_answers(ANSWERS, "jsonl").split("\n")
    assert [json.loads(line) for line in lines] == json.loads(format_answers(ANSWERS, "json"))


def test_csv_has_a_row_per_moment_and_escapes_text() -> None:
    rows = list(csv.reader(io.StringIO(format_answers(ANSWERS, "csv"))))
    assert rows[0] == ["video", "query", "rank", "start", "end", "score"]
    assert rows[1] == ["3MSZA", 'person says "hi", then\nleaves', "1", "20.0", "30.5", "0.75"]
    assert [row[2] for row in rows[1:]] == ["1", "2", "3", "1"]


def test_srt_numbers_the_best_moment_of_each_query_in_time_order() -> None:
    blocks = format_answers(ANSWERS, "srt").split("\n\n")
    assert blocks == [
        "1\n00:00:01,250 --> 01:01:01,500\na dog",
        '2\n00:00:20,000 --> 00:00:30,500\nperson says "hi", then leaves',
    ]


@given(st.floats(0, 1e5))
def test_srt_times_have_three_digits_after_a_comma(seconds: float) -> None:
    line = format_answers([Answer("q", "v", 2e5, [Moment(seconds, seconds, 1)])], "srt").splitlines()[1]
    hours, minutes, second, thousandths = map(int, re.fullmatch(r"(\d\d+):(\d\d):(\d\d),(\d{3}) --> .*", line).groups())
    assert minutes < 60
    assert second < 60
    assert hours * 3600 + minutes * 60 + second + thousandths / 1000 == pytest.approx(seconds, abs=0.000501)


def test_empty_answers_give_valid_output() -> None:
    assert json.loads(format_answers([], "json")) == []
    assert format_answers([], "csv") == "video,query,rank,start,end,score"
    assert format_answers(ANSWERS[2:], "srt") == ""


def one_answer(query: str, video: str = "v") -> list[Answer]:
    return [Answer(query, video, 40.0, [Moment(-0.5, 30.5, 0.75)])]


texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)


@given(
    st.sampled_from(["=", "+", "-", "@", "＝", "＋", "－", "＠", "﹣", "\t", "\r", "'", " =", "\ufeff="]) | st.just(""),
    texts,
)
def test_csv_escapes_formulas_and_reads_back(start: str, text: str) -> None:
    written = io.StringIO(format_answers(one_answer(start + text, start + text), "csv"), newline="")
    row = list(csv.reader(written))[1]
    for cell in row[:2]:
        assert cell.lstrip()[:1] not in tuple("=+-@＝＋－＠")
        assert cell[:1] not in ("\t", "\r")
        assert cell.removeprefix("'") == start + text


def test_csv_keeps_ordinary_text_and_numbers() -> None:
    row = list(csv.reader(io.StringIO(format_answers(one_answer("person x=1 - @home"), "csv"))))[1]
    assert row == ["v", "person x=1 - @home", "1", "-0.5", "30.5", "0.75"]


def test_query_text_cannot_add_output_lines() -> None:
    text = format_answers(one_answer("a\n  0:00.0 - 0:01.0  1.000\x1b[2J\tb", "v\nw"), "text")
    assert len(text.splitlines()) == 2
    assert "\x1b" not in text
    assert "\t" not in text
