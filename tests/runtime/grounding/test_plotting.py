"""Test `runtime.grounding.plotting`: a row for each moment, a legend, and a strip of frames."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.core.errors import DeviceError, OutputError
from runtime.core.moments import Moment
from runtime.grounding import plotting
from runtime.grounding.formatting import Answer
from runtime.grounding.plotting import BEST, FRAMES, OTHERS, TRUTH, draw
from runtime.media.video_file import probe
from tests.raising import raises

pytest.importorskip("matplotlib", reason="draws the pictures (pip install '.[plot]')")

MOMENTS = [Moment(20.0, 30.5, 0.75), Moment(0.0, 10.0, 0.5), Moment(39.5, 40.0, 0.0625)]
ANSWERS = [
    Answer('person says "hi", then\nleaves', "3MSZA", 40.0, MOMENTS, [(20.0, 40.0)]),
    Answer("a dog", "3MSZA", 40.0, [Moment(1.25, 36.5, 0.5)]),
    Answer("nothing", "3MSZA", 40.0, []),
]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collect the drawn figures instead of writing them."""
    figures: list[Any] = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda self, *_, **__: figures.append(self))
    return figures


def bars(axes: Any) -> list[tuple[float, float]]:
    return [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches if bar.get_gid() == "bar"]


def rows(axes: Any) -> int:
    return len({bar.get_y() for bar in axes.patches if bar.get_gid() == "track"})


def texts(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


def to_hex(patch: Any) -> str:
    from matplotlib.colors import to_hex

    return to_hex(patch.get_facecolor())


def png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def test_plot_is_png_with_height_by_query_count(tmp_path: Path) -> None:
    draw(ANSWERS, tmp_path / "three.png")
    draw(ANSWERS[1:2], tmp_path / "one.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png", "three.png"]
    (width, tall), (same_width, low) = png_size(tmp_path / "three.png"), png_size(tmp_path / "one.png")
    assert width == same_width == 1200
    assert 100 < low < tall < 1200


def test_plot_draws_several_ground_truths_in_one_row(drawn: list[Any], tmp_path: Path) -> None:
    draw([Answer("a", "v", 40.0, [Moment(1, 2, 0.5)], [(20.0, 22.0), (30.0, 40.0)])], tmp_path / "plot.png")
    (axes,) = drawn[0].axes
    assert rows(axes) == 2
    assert bars(axes) == [(1.0, 2.0), (20.0, 22.0), (30.0, 40.0)]
    assert axes.get_xlim() == (0, 40)
    assert "2 moments  truth" in texts(axes)


def test_plot_of_several_queries_has_a_row_for_each_moment(drawn: list[Any], tmp_path: Path) -> None:
    draw(ANSWERS, tmp_path / "plot.png")
    (axes,) = drawn[0].axes
    # Three moments and the ground truth, one moment, and none.
    assert rows(axes) == 6
    assert bars(axes) == [(20.0, 30.5), (0.0, 10.0), (39.5, 40.0), (20.0, 40.0), (1.25, 36.5)]
    colors = [to_hex(bar) for bar in axes.patches if bar.get_gid() == "bar"]
    assert [color in (BEST, TRUTH) for color in colors] == [True, False, False, True, True]
    heights = [bar.get_height() for bar in axes.patches if bar.get_gid() == "bar"]
    assert heights[0] > heights[1] == pytest.approx(heights[2])
    captions = {"0:20.0 – 0:30.5  0.75", "0:00.0 – 0:10.0  0.50", "0:39.5 – 0:40.0  0.06", "no moment found"}
    assert captions | {"0:20.0 – 0:40.0  truth"} <= set(texts(axes))


@pytest.mark.parametrize(
    ("answers", "expected"), [(ANSWERS, [BEST, OTHERS, TRUTH]), (ANSWERS[1:], [BEST]), (ANSWERS[2:], [])]
)
def test_plot_legend_shows_colors(drawn: list[Any], tmp_path: Path, answers: list[Answer], expected: list[str]) -> None:
    draw(answers, tmp_path / "plot.png")
    assert [to_hex(patch) for legend in drawn[0].legends for patch in legend.get_patches()] == expected


@pytest.mark.parametrize("count", [1, 5])
def test_plot_of_long_sentences_has_no_overlapping_text(drawn: list[Any], tmp_path: Path, count: int) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    moments = [Moment(30000.0 + rank, 31000.0 + 10 * rank, 0.9 - 0.1 * rank) for rank in range(5)]
    query, name = "a person opens the door and then walks out " * 20, "Kitchen of Apartment 17, " * 9
    answer = Answer(query, name, 360000.0, moments, [(0.0, 1.0)])
    draw([answer] * count, tmp_path / "plot.png")
    figure = drawn[0]
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    (axes,) = figure.axes
    written = [*axes.texts, *figure.legends[0].get_texts(), *axes.get_xticklabels()]
    boxes = sorted((text.get_window_extent(renderer) for text in written if text.get_text()), key=lambda box: box.y0)
    assert len(boxes) > count * 9
    for index, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0
        assert box.x1 <= figure.bbox.x1
        for other in boxes[index + 1 : index + 20]:
            # Boxes include the space above and below letters, so neighboring lines may share a pixel.
            assert min(box.x1, other.x1) <= max(box.x0, other.x0) or min(box.y1, other.y1) <= max(box.y0, other.y0) + 1


def test_plot_of_many_moments_has_limited_height(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Many image readers reject more than 32,767 pixels.
    assert plotting.MAX_PIXELS <= 32_000
    answer = Answer("a dog", "v", 10.0, [Moment(1, 2, 0.5)] * 40)
    draw([answer], tmp_path / "plot.png")
    assert png_size(tmp_path / "plot.png")[1] > 800
    monkeypatch.setattr(plotting, "MAX_PIXELS", 600)
    draw([answer], tmp_path / "plot.png")
    assert 550 < png_size(tmp_path / "plot.png")[1] <= 600


def test_plot_of_shortest_edge_moment_is_visible_and_inside(drawn: list[Any], tmp_path: Path) -> None:
    draw([Answer("edges", "v", 7200.0, [Moment(0, 0, 0.9), Moment(7200, 7200, 0)])], tmp_path / "plot.png")
    first, last = bars(drawn[0].axes[0])
    assert first[0] == 0
    assert last[1] == pytest.approx(7200)
    assert min(first[1] - first[0], last[1] - last[0]) == pytest.approx(7200 * 0.003)


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize(
    "query",
    [
        r"pays $\frac$",
        "$x",
        "word " * 300,
        "x" * 5000,
        "男は庭で車を洗っている" * 9,
        "a\tb\u0301 \U0001f600",
        "رجل يفتح الباب",
        "person \udce9 \x1b[31m opens",
    ],
)
def test_plot_keeps_any_text_within_the_figure(tmp_path: Path, drawn: list[Any], query: str) -> None:
    draw([Answer(query, "caf\udce9\n\x1b", 10.0, [Moment(1, 2, 0.5)])], tmp_path / "plot.png")
    figure = drawn[0]
    assert 1 <= len([line for line in texts(figure.axes[0]) if line]) <= 5
    for text in figure.axes[0].texts:
        assert text.get_window_extent().x1 <= figure.bbox.x1


@pytest.mark.parametrize("duration", [0.04, 3.0, 18.1, 59.0, 3600.0, 86400.0 * 30, 1e8])
def test_plot_ticks_have_distinct_clock_labels(drawn: list[Any], tmp_path: Path, duration: float) -> None:
    draw([Answer("a", "v", duration, [])], tmp_path / "plot.png")
    (axes,) = drawn[0].axes
    ticks = axes.get_xticks()
    assert 1 <= len(ticks) <= 200
    labels = [axes.xaxis.get_major_formatter()(tick) for tick in ticks]
    assert len(set(labels)) == len(labels)
    assert axes.get_xlim() == (0, duration)


def shade(picture: np.ndarray) -> float:
    """Return the brightness of the top right quarter of `scene`: the number of the frame times seven."""
    height, width = picture.shape[:2]
    return float(picture[height // 8 : height * 3 // 8, width * 5 // 8 : width * 7 // 8].mean())


def test_frame_strip_shows_middle_frame_of_each_part(drawn: list[Any], tmp_path: Path) -> None:
    films = pytest.importorskip("tests.films")
    video_file = probe(films.film(tmp_path / "hall.mkv", 36, rate=10))
    draw([Answer("a", "hall", video_file.duration, MOMENTS[:0])], tmp_path / "plot.png", video_file)
    _, strip = drawn[0].axes
    count = len(strip.images)
    assert FRAMES[0] <= count <= FRAMES[1]
    for number, image in enumerate(strip.images):
        left, right, *_ = image.get_extent()
        assert (left, right) == pytest.approx((number * 3.6 / count, (number + 1) * 3.6 / count))
        shown = int((left + right) / 2 * 10 + 1e-6)
        assert shade(np.asarray(image.get_array())) == pytest.approx(shown * 7, abs=4)


def test_frame_strip_highlights_the_best_moment(drawn: list[Any], tmp_path: Path) -> None:
    films = pytest.importorskip("tests.films")
    video_file = probe(films.film(tmp_path / "hall.mkv", 40, rate=10))
    answers = [Answer("a", "hall", 4.0, [Moment(1, 2, 0.5)]), Answer("b", "hall", 4.0, [Moment(0, 4, 0.5)])]
    draw(answers[:1], tmp_path / "plot.png", video_file)
    draw(answers, tmp_path / "plot.png", video_file)
    veils = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in drawn[0].axes[1].patches]
    assert veils == [(0, 1), (2, 4)]
    assert not drawn[1].axes[1].patches


@pytest.mark.parametrize(("size", "turned"), [((64, 48), 90), ((16, 320), None), ((320, 16), None)])
def test_strip_keeps_aspect_ratio(drawn: list[Any], tmp_path: Path, size: tuple[int, int], turned: int | None) -> None:
    films = pytest.importorskip("tests.films")
    video_file = probe(films.film(tmp_path / "odd.mp4", films.scene(20, *size), turned=turned))
    draw([Answer("a", "odd", video_file.duration, [])], tmp_path / "plot.png", video_file)
    figure = drawn[0]
    strip = figure.axes[1].get_window_extent()
    height, width = np.asarray(figure.axes[1].images[0].get_array()).shape[:2]
    shown = strip.width / len(figure.axes[1].images) / strip.height
    assert shown == pytest.approx(width / height, rel=0.1)
    assert 0.25 * 0.9 <= shown <= 8 * 1.1
    assert figure.get_size_inches()[1] < 5


def test_missing_matplotlib_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with raises(DeviceError, "missing_library", "pip install '.[plot]'"):
        draw(ANSWERS, tmp_path / "plot.png")


def test_unwritable_plot_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    with raises(OutputError, "unwritable_output", tmp_path / "file" / "plot.png"):
        draw(ANSWERS[1:2], tmp_path / "file" / "plot.png")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
