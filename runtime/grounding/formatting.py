"""Moments for people and programs: text, tables, subtitles."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import unicodedata
from collections.abc import Sequence
from typing import Any, Literal

from runtime.core.errors import printable_line
from runtime.core.moments import Moment

Format = Literal["text", "json", "jsonl", "csv", "srt"]

# With these a spreadsheet begins a formula.
FORMULA_STARTS = tuple("=+-@")
INVISIBLE = "\ufeff\u200b\u200c\u200d\u2060"


@dataclasses.dataclass(frozen=True)
class Answer:
    """The moments of one query.

    Attributes:
        query: as asked.
        video: its name.
        duration: of the video in the time of players, in seconds: what lies before its first picture counts.
        moments: best first, in the time of players.
        truths: starts and ends in seconds in the time of players, where known.
    """

    query: str
    video: str
    duration: float
    moments: Sequence[Moment]
    truths: Sequence[tuple[float, float]] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "query": self.query,
            "video": self.video,
            "moments": [dict(vars(moment)) for moment in self.moments],
        }


def format_answers(answers: Sequence[Answer], form: Format, width: int = 100) -> str:
    """Return answers in one of the formats; text fits a terminal of `width` columns."""
    if form == "text":
        return "\n\n".join(_text(answer, width) for answer in answers)
    if form == "json":
        return json.dumps([answer.to_dict() for answer in answers], indent=2)
    if form == "jsonl":
        return "\n".join(json.dumps(answer.to_dict()) for answer in answers)
    if form == "csv":
        return _csv(answers)
    return _srt(answers)


def format_timestamp(seconds: float, decimals: int = 1) -> str:
    """Return a time as people read it: 0:07.5, 12:03.0, 1:02:03.0."""
    ticks = round(seconds * 10**decimals)
    whole, fraction = divmod(ticks, 10**decimals)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    text = f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
    return f"{text}.{fraction:0{decimals}}" if decimals else text


def _text(answer: Answer, width: int) -> str:
    rows = [
        (format_timestamp(m.start), format_timestamp(m.end), f"{m.score:.3f}", (m.start, m.end), "█")
        for m in answer.moments
    ]
    rows += [(format_timestamp(truth[0]), format_timestamp(truth[1]), "truth", truth, "▒") for truth in answer.truths]
    columns = [max((len(row[index]) for row in rows), default=0) for index in range(3)]
    bar_width = max(20, width - sum(columns) - 10)
    # On one line, whatever is in a name or a query: what it adds must not look like an answer.
    lines = [f"{printable_line(answer.video)} ({format_timestamp(answer.duration)})  “{printable_line(answer.query)}”"]
    if not answer.moments:
        lines.append("  no moment found")
    for start, end, score, span, mark in rows:
        bar = _bar(span, answer.duration, bar_width, mark)
        lines.append(f"  {start:>{columns[0]}} - {end:>{columns[1]}}  {score:>{columns[2]}}  {bar}")
    return "\n".join(lines)


def _bar(span: tuple[float, float], duration: float, width: int, mark: str) -> str:
    """Return a line of `width` cells with those marked that the span covers, at least one."""
    first = min(int(span[0] / duration * width), width - 1)
    last = max(first + 1, min(round(span[1] / duration * width), width))
    return "·" * first + mark * (last - first) + "·" * (width - last)


def _csv(answers: Sequence[Answer]) -> str:
    rows: list[tuple[object, ...]] = [("video", "query", "rank", "start", "end", "score")]
    for answer in answers:
        for rank, moment in enumerate(answer.moments, 1):
            texts = csv_text(answer.video), csv_text(answer.query)
            rows.append((*texts, rank, moment.start, moment.end, moment.score))
    return "\n".join(map(_csv_row, rows))


def _csv_row(values: tuple[object, ...]) -> str:
    stream = io.StringIO(newline="")
    # Only a terminator that holds a carriage return lets the writer quote texts that hold one.
    csv.writer(stream, lineterminator="\r\n").writerow(values)
    return stream.getvalue().removesuffix("\r\n")


def csv_text(text: str) -> str:
    """Return text as a CSV cell that no spreadsheet takes for a formula: one apostrophe may be added in front.

    Whoever reads the cell removes one apostrophe from its start, if there is one, and has the text again.
    """
    # Spreadsheets skip white space and invisible characters, and read full-width signs as their ASCII forms.
    start = unicodedata.normalize("NFKC", text.lstrip().lstrip(INVISIBLE).lstrip()[:1])
    return f"'{text}" if start[:1] in FORMULA_STARTS or text[:1] in ("'", "\t", "\r", "\n") else text


def _srt(answers: Sequence[Answer]) -> str:
    """The best moment of every query, as a subtitle in time order."""
    best = sorted(((answer.moments[0], answer.query) for answer in answers if answer.moments), key=lambda x: x[0].start)
    blocks = [
        f"{number}\n{_srt_time(moment.start)} --> {_srt_time(moment.end)}\n{' '.join(query.split())}\n"
        for number, (moment, query) in enumerate(best, 1)
    ]
    return "\n".join(blocks).rstrip("\n")


def _srt_time(seconds: float) -> str:
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02},{rest % 1000:03}"
