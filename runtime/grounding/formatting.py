"""Format moments as text, JSON, CSV or SRT subtitles."""

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

# Characters with which a spreadsheet formula can start.
FORMULA_STARTS = tuple("=+-@")
INVISIBLE = "\ufeff\u200b\u200c\u200d\u2060"


@dataclasses.dataclass(frozen=True)
class Answer:
    """The moments of one query. All times are seconds of the video file, as players show them.

    Attributes:
        duration: end of the video in seconds of the file, which includes time before its first frame.
        moments: moments of the query, best first.
        truths: start and end of each ground-truth moment, if known.
        exist_score: whether the video shows the query at all, in [0, 1], at least 0.5 from the no-match threshold on;
            None for a model without one.
    """

    query: str
    video: str
    duration: float
    moments: Sequence[Moment]
    truths: Sequence[tuple[float, float]] = ()
    exist_score: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "query": self.query,
            "video": self.video,
            "moments": [dict(vars(moment)) for moment in self.moments],
            **({} if self.exist_score is None else {"pred_exist_score": self.exist_score}),
        }


def format_answers(answers: Sequence[Answer], form: Format, width: int = 100) -> str:
    """Return answers in one of the formats.

    Args:
        form: `text` has a bar for each moment, `json` an array, `jsonl` a line for each query, `csv` a line for each
            moment, and `srt` the best moment of each query as a subtitle.
        width: columns of the terminal, for `text`.
    """
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
    """Return a time as `[H:]M:SS.d`: 0:07.5, 12:03.0, 1:02:03.0.

    Args:
        decimals: number of digits after the point.
    """
    total_seconds, fraction = divmod(round(seconds * 10**decimals), 10**decimals)
    total_minutes, second = divmod(total_seconds, 60)
    hours, minute = divmod(total_minutes, 60)
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
    # Line breaks in a name or query are escaped, so that they cannot imitate an answer.
    lines = [f"{printable_line(answer.video)} ({format_timestamp(answer.duration)})  “{printable_line(answer.query)}”"]
    if not answer.moments:
        lines.append("  no moment found")
    for start, end, score, span, mark in rows:
        bar = _bar(span, answer.duration, bar_width, mark)
        lines.append(f"  {start:>{columns[0]}} - {end:>{columns[1]}}  {score:>{columns[2]}}  {bar}")
    return "\n".join(lines)


def _bar(span: tuple[float, float], duration: float, width: int, mark: str) -> str:
    """Return a line of `width` cells with those of the span marked, at least one."""
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
    # The csv module quotes carriage returns only if the line terminator contains one.
    csv.writer(stream, lineterminator="\r\n").writerow(values)
    return stream.getvalue().removesuffix("\r\n")


def csv_text(text: str) -> str:
    """Return text as a CSV cell that no spreadsheet runs as a formula, with an apostrophe in front if necessary.

    A reader gets the text back by removing one leading apostrophe, if there is one.
    """
    # Spreadsheets ignore leading white space and invisible characters, and treat full-width signs as ASCII.
    start = unicodedata.normalize("NFKC", text.lstrip().lstrip(INVISIBLE).lstrip()[:1])
    return f"'{text}" if start[:1] in FORMULA_STARTS or text[:1] in ("'", "\t", "\r", "\n") else text


def _srt(answers: Sequence[Answer]) -> str:
    """Return the best moment of every query as a subtitle, in order of time."""
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
