"""Moments for people: text, tables, subtitles, and a picture of the video's time line."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from runtime.errors import DeviceError
from runtime.files import replace_when_whole
from runtime.moments import Moment

Format = Literal["text", "json", "jsonl", "csv", "srt"]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What was found for one query.

    Attributes:
        query: as asked.
        video: its name.
        duration: of the video, in seconds.
        moments: best first.
        truth: start and end in seconds, where known.
    """

    query: str
    video: str
    duration: float
    moments: Sequence[Moment]
    truth: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "query": self.query,
            "video": self.video,
            "moments": [dataclasses.asdict(moment) for moment in self.moments],
        }


def render(answers: Sequence[Answer], form: Format, width: int = 100) -> str:
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


def clock(seconds: float, decimals: int = 1) -> str:
    """Return a time as people read it: 0:07.5, 12:03.0, 1:02:03.0."""
    ticks = round(seconds * 10**decimals)
    whole, fraction = divmod(ticks, 10**decimals)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    text = f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
    return f"{text}.{fraction:0{decimals}}" if decimals else text


def _text(answer: Answer, width: int) -> str:
    rows = [(clock(m.start), clock(m.end), f"{m.score:.3f}", (m.start, m.end), "█") for m in answer.moments]
    if answer.truth:
        rows.append((clock(answer.truth[0]), clock(answer.truth[1]), "truth", answer.truth, "▒"))
    columns = [max((len(row[index]) for row in rows), default=0) for index in range(3)]
    bar_width = max(20, width - sum(columns) - 10)
    lines = [f"{answer.video} ({clock(answer.duration)})  “{answer.query}”"]
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
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(("video", "query", "rank", "start", "end", "score"))
    for answer in answers:
        for rank, moment in enumerate(answer.moments, 1):
            writer.writerow((answer.video, answer.query, rank, moment.start, moment.end, moment.score))
    return stream.getvalue().rstrip("\n")


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


def draw(answers: Sequence[Answer], path: Path) -> None:
    """Draw the moments of every query on the video's time line into a PNG; truth beneath, where known.

    Raises:
        DeviceError: matplotlib is not installed.
        OutputError: the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DeviceError("--plot needs matplotlib; run `pip install 'drn-deploy[plot]'`.") from error
    rows = [len(answer.moments) + (answer.truth is not None) for answer in answers]
    heights = [0.9 + 0.28 * count for count in rows]
    figure = Figure(figsize=(10, sum(heights) + 0.4), layout="constrained")
    panels = figure.subplots(len(answers), squeeze=False, height_ratios=heights)[:, 0]
    for answer, axes in zip(answers, panels):
        top = max((moment.score for moment in answer.moments), default=1.0) or 1.0
        for rank, moment in enumerate(answer.moments):
            # The best is full, the others fade with their score.
            shade = 0.25 + 0.75 * moment.score / top
            axes.barh(rank, moment.end - moment.start, left=moment.start, color="tab:blue", alpha=shade, height=0.75)
            label = f"{clock(moment.start)}–{clock(moment.end)}  {moment.score:.2f}"
            _label(axes, rank, moment.start, moment.end, answer.duration, label)
        if answer.truth:
            start, end = answer.truth
            axes.barh(len(answer.moments), end - start, left=start, color="tab:green", height=0.75)
            _label(axes, len(answer.moments), start, end, answer.duration, f"{clock(start)}–{clock(end)}  truth")
        axes.set_xlim(0, answer.duration)
        axes.set_ylim(max(len(answer.moments) + (answer.truth is not None), 1) - 0.4, -0.6)
        axes.set_yticks([])
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
        title = "\n".join(textwrap.wrap(f"{answer.video}: “{answer.query}”", 110))
        # A query may hold dollar signs, which are no formula here.
        axes.set_title(title, loc="left", fontsize=10, parse_math=False)
        axes.xaxis.set_major_formatter(lambda value, _: clock(value, 0))
    with replace_when_whole(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def _label(axes: Any, row: int, start: float, end: float, duration: float, text: str) -> None:
    """Write beside a bar, on the side that has room."""
    if end < 0.8 * duration:
        axes.text(end + 0.008 * duration, row, text, va="center", fontsize=8)
    elif start > 0.2 * duration:
        axes.text(start - 0.008 * duration, row, text, va="center", ha="right", fontsize=8)
    else:
        axes.text((start + end) / 2, row, text, va="center", ha="center", fontsize=8, color="white", fontweight="bold")
