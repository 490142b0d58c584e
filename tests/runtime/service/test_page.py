"""Test the web page in Chromium, by mouse, by keyboard, and at the width of a phone."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.datasets.dataset import DataSet
from runtime.grounding.grounder import Grounder
from runtime.media.video_file import probe
from tests.array_bytes import npy
from tests.films import film, holed, scene
from tests.runtime.service.conftest import KEY, Running

# .ci/run sets the variable, so that these tests fail there instead of being skipped.
CHROMIUM = os.environ.get("DRN_CHROMIUM") or shutil.which("chromium")
if not os.environ.get("DRN_CHROMIUM"):
    if CHROMIUM is None:
        pytest.skip("Debian's chromium is not installed", allow_module_level=True)
    pytest.importorskip("playwright", reason="Playwright drives the browser")
from playwright.sync_api import Browser, Page, expect, sync_playwright  # noqa: E402 - after it is known to be there

# Chromium runs as root in a container, and must not contact any service.
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--autoplay-policy=no-user-gesture-required",
)
# Expectations have the same timeout as actions, because a page may be slow on a busy machine.
PATIENCE_MS = 15_000
expect.set_options(timeout=PATIENCE_MS)
SHOWN = "SIM00001"
UNSHOWN = "SIM00002"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def shown(
    start: Callable[..., Running], model: Path, planted: Path, extractor: Path, tmp_path_factory: pytest.TempPathFactory
) -> Running:
    """A service with the video file of one of its videos."""
    directory = tmp_path_factory.mktemp("page")
    (directory / "media").mkdir()
    seconds = DataSet(planted).durations[SHOWN]
    film(directory / "media" / f"{SHOWN}.webm", scene(round(seconds * 5)), rate=5)
    return start(
        *("--model", model, "--data", planted, "--extractor", extractor),
        *("--media", directory / "media", "--uploads", directory / "uploads"),
    )


class Seen:
    """A page of a service, and the errors that occurred in it."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.query = page.get_by_label("What happens?")
        self.answers = page.locator("#answers > li")
        self.requested: list[str] = []
        self.errors: list[str] = []
        page.on("request", lambda request: self.requested.append(request.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))

    def open(self, fragment: str = "") -> Page:
        self.page.goto(self.url + fragment)
        return self.page

    def choose(self, name: str) -> None:
        self.page.get_by_label("Video", exact=True).fill(name)
        self.page.get_by_role("option", name=re.compile(name)).click()
        expect(self.page.locator("#timeline")).to_be_visible()

    def send(self, sentence: str) -> None:
        self.query.fill(sentence)
        self.page.keyboard.press("Enter")

    def ask(self, sentence: str) -> None:
        before = self.answers.count()
        self.send(sentence)
        expect(self.answers).to_have_count(before + 1)
        expect(self.answers.last.locator(".moment").first).to_be_visible()

    def upload(self, path: Path) -> None:
        self.page.get_by_role("button", name="Upload a video").click()
        self.page.get_by_label("File").set_input_files(path)
        self.page.get_by_role("button", name="Upload", exact=True).click()


@contextlib.contextmanager
def opened(browser: Browser, service: Running, phone: bool = False) -> Iterator[Seen]:
    """Yield a new page of a service, in a window of a common size or of the size of a phone."""
    size = {"width": 390, "height": 844} if phone else {"width": 1280, "height": 860}
    context = browser.new_context(viewport=size, is_mobile=phone, has_touch=phone)  # type: ignore[arg-type]
    context.set_default_timeout(PATIENCE_MS)
    seen = Seen(context.new_page(), service.url)
    yield seen
    context.close()
    assert [url for url in seen.requested if not url.startswith((seen.url, f"blob:{seen.url}"))] == []
    # The browser also logs rejected requests; all other errors are defects of the page.
    assert [error for error in seen.errors if "status of 4" not in error and "ERR_FAILED" not in error] == []


@pytest.fixture
def seen(browser: Browser, shown: Running, request: pytest.FixtureRequest) -> Iterator[Seen]:
    """A new page; the parameter `phone` gives it the size of a phone."""
    with opened(browser, shown, phone=getattr(request, "param", None) == "phone") as seen:
        yield seen


def until(page: Page, condition: str) -> None:
    """Wait for a condition. Playwright's own function evaluates text in the page, which its policy forbids."""
    for _ in range(300):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    pytest.fail(f"it never came that {condition}")


def time(page: Page) -> float:
    return float(page.evaluate("document.querySelector('#player').currentTime"))


def moments(seen: Seen, row: int = 0) -> list[list[float]]:
    """Return the displayed starts and ends, best first."""
    texts = seen.answers.nth(row).locator(".when").all_inner_texts()
    return [
        [60 * int(minutes) + float(rest) for minutes, rest in re.findall(r"(\d+):([\d.]+)", text)] for text in texts
    ]


def test_clicked_moment_plays_from_start_to_end(seen: Seen, shown: Running) -> None:
    page = seen.open()
    seen.choose(SHOWN)
    seen.ask("person opens the door")
    answer = shown.ask({"video": SHOWN, "query": "person opens the door"}).json[0]["moments"]
    assert moments(seen) == [[round(one["start"], 1), round(one["end"], 1)] for one in answer]
    bars = page.locator(".track .bar")
    assert bars.count() == 5
    shortest = min(range(5), key=lambda rank: answer[rank]["end"] - answer[rank]["start"])
    page.evaluate("document.querySelector('#player').playbackRate = 8")
    page.locator(".moment").nth(shortest).click()
    until(page, f"document.querySelector('#player').currentTime > {answer[shortest]['start']}")
    until(page, "document.querySelector('#player').paused")
    assert time(page) == pytest.approx(answer[shortest]["end"], abs=2.0)
    assert page.locator(".bar.chosen").count() == 1
    left = page.locator(".bar.chosen").evaluate("bar => parseFloat(bar.style.left)")
    duration = shown.get(f"/v1/videos/{SHOWN}").json["duration"]
    assert left == pytest.approx(100 * answer[shortest]["start"] / duration)
    # A click on the time line seeks.
    box = page.locator("#timeline").bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + box["width"] / 4, box["y"] + box["height"] - 4)
    assert time(page) == pytest.approx(duration / 4, abs=0.2)


def test_page_is_usable_with_keyboard_only(seen: Seen) -> None:
    page = seen.open()
    keys = page.keyboard
    until(page, "document.querySelector('#model').textContent !== ''")
    for _ in range(4):
        keys.press("Tab")
    assert page.evaluate("document.activeElement.id") == "picker"
    keys.type(SHOWN[-3:])
    page.wait_for_selector("[role=option][aria-selected=true]")
    keys.press("Enter")
    until(page, "document.activeElement.id === 'query'")
    for sentence in ("person opens the door", "person closes the door"):
        keys.type(sentence)
        keys.press("Enter")
        until(page, f"document.querySelector('#said').textContent.includes('{sentence}')")
    assert page.locator(".track").count() == 2
    for _ in range(9):
        keys.press("Tab")
        if page.evaluate("document.activeElement.classList.contains('moment')"):
            break
    listed = [*moments(seen, 0), *moments(seen, 1)]
    focused = "document.activeElement.id"
    assert page.evaluate(focused) == "moment-0-0"
    for _ in range(5):
        keys.press("ArrowDown")
    assert page.evaluate(focused) == "moment-1-0"
    assert time(page) == pytest.approx(listed[5][0], abs=0.1)
    keys.press("ArrowUp")
    assert page.evaluate(focused) == "moment-0-4"
    keys.press("End")
    assert page.evaluate(focused) == "moment-1-4"
    keys.press("Space")
    until(page, "!document.querySelector('#player').paused")
    keys.press("Space")
    until(page, "document.querySelector('#player').paused")
    keys.press("Delete")
    assert page.locator(".track").count() == 1
    assert page.evaluate(focused) == "moment-0-0"
    # Space plays the video, except in an input.
    page.evaluate("document.activeElement.blur()")
    keys.press("Space")
    until(page, "!document.querySelector('#player').paused")
    keys.press("Space")
    until(page, "document.querySelector('#player').paused")
    seen.query.fill("")
    keys.type("a b")
    assert seen.query.input_value() == "a b"
    assert page.evaluate("document.querySelector('#player').paused")


def test_page_answers_query_sent_before_video_loaded(seen: Seen) -> None:
    held: list[Any] = []
    seen.page.route(f"**/v1/videos/{SHOWN}", lambda route: held.append(route))
    page = seen.open(f"#video={SHOWN}")
    seen.send("person opens the door")
    while not held:
        page.wait_for_timeout(20)
    page.wait_for_timeout(100)
    assert page.locator("#problem").is_hidden()
    held[0].continue_()
    expect(seen.answers.locator(".moment").first).to_be_visible()
    assert seen.answers.count() == 1
    assert seen.errors == []


@pytest.mark.parametrize("seen", ["desk", "phone"], indirect=True)
def test_page_fits_the_screen_with_touchable_controls(seen: Seen) -> None:
    page = seen.open(f"#video={SHOWN}")
    for sentence in ("person opens the door", "a person is closing the door " * 3, "person opens a window"):
        seen.ask(sentence.strip())
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    boxes = "[...document.querySelectorAll('{}')].map(element => element.getBoundingClientRect().{})"
    panel = page.evaluate("document.querySelector('.questions').getBoundingClientRect().right")
    assert max(page.evaluate(boxes.format(".moment, .track, #ask, .sentence", "right"))) <= panel
    assert min(size for size in page.evaluate(boxes.format("main button", "height")) if size) >= 24
    page.get_by_role("button", name="Upload a video").click()
    box = page.locator("#sending").bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= page.viewport_size["width"]  # type: ignore[index]


def test_queries_are_shown_in_rows_of_distinct_color(seen: Seen) -> None:
    page = seen.open()
    seen.choose(SHOWN)
    page.get_by_label("Moments").select_option("1")
    sentences = [
        f"person opens the door and {word}" for word in ("a", "the", "in", "his", "her", "on", "is", "of", "it")
    ]
    for sentence in sentences[:8]:
        seen.ask(sentence)
    colours = page.locator(".track .bar").evaluate_all("bars => bars.map(bar => getComputedStyle(bar).backgroundColor)")
    assert len(colours) == len(set(colours)) == 8
    # The ninth query replaces the first, and a repeated query is listed once.
    for sentence in (sentences[8], sentences[4]):
        seen.send(sentence)
        expect(seen.answers.last).to_contain_text(sentence)
        expect(seen.answers).to_have_count(8)
    page.get_by_role("button", name=f"Remove “{sentences[5]}”").click()
    expect(page.locator(".track")).to_have_count(7)
    page.get_by_role("button", name="Clear all").click()
    expect(page.locator(".track")).to_have_count(0)


def test_video_without_media_shows_timeline_only(seen: Seen, tmp_path: Path) -> None:
    page = seen.open()
    expect(page.locator("#blank-text")).to_have_text("Choose a video to begin.")
    seen.choose(UNSHOWN)
    seen.ask("person opens the door")
    expect(page.locator("#blank-text")).to_contain_text("no video file of this video")
    expect(page.locator("#player")).to_be_hidden()
    page.locator(".moment").nth(1).click()
    head = page.locator("#head").evaluate("head => parseFloat(head.style.left)")
    bar = page.locator(".bar.chosen").evaluate("bar => parseFloat(bar.style.left)")
    assert head == pytest.approx(bar, abs=0.01)
    # A local video file is never uploaded.
    num_before = len(seen.requested)
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Play a video file from this device").click()
    chooser.value.set_files(film(tmp_path / "mine.webm", scene(20), rate=5))
    until(page, "document.querySelector('#player').readyState >= 2")
    assert [url for url in seen.requested[num_before:] if not url.startswith("blob:")] == []


def test_example_opens_its_video_and_asks_its_sentence(seen: Seen) -> None:
    page = seen.open()
    examples = page.locator(".example")
    expect(examples.first).to_contain_text(SHOWN)
    # The picture of a video is a frame of its file.
    expect(page.locator(".example video")).to_have_count(1)
    until(page, "document.querySelector('.example video').readyState >= 2")
    sentence = examples.first.locator(".about").inner_text().strip("“”")
    examples.first.click()
    expect(page.locator(".sentence span").first).to_have_text(sentence)
    expect(seen.answers.locator(".moment").first).to_be_visible()
    expect(page.locator("#examples")).to_be_hidden()
    assert page.get_by_label("Video", exact=True).input_value() == SHOWN
    page.get_by_role("link", name="When does it happen?").click()
    expect(examples.first).to_be_visible()


def test_words_of_the_query_are_completed(seen: Seen, offline: Grounder) -> None:
    page = seen.open()
    keys = page.keyboard
    options = page.locator("#words [role=option]")
    known = sorted(word for word in offline.manifest.vocabulary.words if word.startswith("op"))
    seen.query.press_sequentially("person op")
    expect(options).to_have_text(known)
    # Without a selected word Enter sends the query.
    keys.press("ArrowDown")
    keys.press("Enter")
    expect(seen.query).to_have_value(f"person {known[0]} ")
    expect(page.locator("#words")).to_be_hidden()
    keys.type("the zork")
    expect(page.locator("#words")).to_contain_text("No known word")
    keys.press("Escape")
    expect(page.locator("#words")).to_be_hidden()
    # A word in the middle of the query is completed in its place.
    seen.query.fill("person op door")
    for _ in range(len(" door")):
        keys.press("ArrowLeft")
    keys.press("ArrowDown")
    options.last.click()
    expect(seen.query).to_have_value(f"person {known[-1]} door")


def test_answers_and_clips_are_saved_as_files(seen: Seen, tmp_path: Path) -> None:
    page = seen.open()
    seen.choose(SHOWN)
    expect(page.locator("#downloads")).to_be_hidden()
    for sentence in ("person opens the door", "person closes the door"):
        seen.ask(sentence)
    for label, head in (("Subtitles", "1\n00:00:"), ("Table", "video,query,rank,start,end,score")):
        with page.expect_download() as saved:
            page.get_by_role("button", name=label).click()
        text = Path(saved.value.path()).read_text()
        assert text.startswith(head)
        assert text.count("person opens the door") == (1 if label == "Subtitles" else 5)
        assert saved.value.suggested_filename.startswith(SHOWN)
    # The button of an answer saves its selected moment.
    page.locator(".moment").nth(1).click()
    start, end = moments(seen)[1]
    with page.expect_download() as saved:
        page.locator(".clip").first.click()
    saved.value.save_as(tmp_path / "clip.mp4")
    assert saved.value.suggested_filename == f"{SHOWN} person opens the door.mp4"
    assert probe(tmp_path / "clip.mp4").duration == pytest.approx(end - start, abs=0.5)
    page.route("**/clip?*", lambda route: route.abort())
    page.locator(".clip").first.click()
    expect(page.get_by_role("alert")).to_contain_text("cannot be reached")
    expect(page.locator(".clip").first).to_be_enabled()


def test_answers_below_the_threshold_are_doubtful(browser: Browser, choosy: Running) -> None:
    with opened(browser, choosy) as seen:
        page = seen.open()
        seen.choose(UNSHOWN)
        seen.ask("person opens the door")
        expect(page.locator(".reason")).to_contain_text("below 1.00")
        expect(page.locator(".moment.doubtful")).to_have_count(5)
        expect(page.locator(".bar.doubtful")).to_have_count(5)
        assert "doubtful" in str(page.locator(".moment").first.get_attribute("aria-label"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_the_contrast_of_wcag_aa(seen: Seen, scheme: Any) -> None:
    page = seen.open()
    page.emulate_media(color_scheme=scheme)

    def luminance(name: str) -> float:
        value = page.evaluate(f"getComputedStyle(document.documentElement).getPropertyValue('--{name}')").strip()
        channels = [int(value[index : index + 2], 16) / 255 for index in (1, 3, 5)]
        linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(*names: str) -> float:
        low, high = sorted(map(luminance, names))
        return (high + 0.05) / (low + 0.05)

    text = [(color, ground) for color in ("text", "quiet", "accent") for ground in ("panel", "ground")]
    text += [("on-accent", "accent"), ("bad", "bad-ground"), ("doubt", "doubt-ground"), ("on-screen", "screen")]
    text += [(f"c{number}", "panel") for number in range(8)]
    assert {pair: round(contrast(*pair), 2) for pair in text if contrast(*pair) < 4.5} == {}
    assert contrast("edge", "panel") >= 3


def test_page_state_is_restored_from_the_url(seen: Seen) -> None:
    page = seen.open()
    seen.choose(UNSHOWN)
    seen.ask("person opens the door")
    seen.ask("person closes the door")
    shown = page.locator("#answers").inner_text()
    page.reload()
    expect(page.locator(".track .bar")).to_have_count(10)
    assert page.locator("#answers").inner_text() == shown
    # HTML in a query is text.
    sentence = "person opens the <img src=x onerror=alert(1)> door"
    seen.open("?" + "#" + f"video={UNSHOWN}&q={sentence.replace('<', '%3C').replace(' ', '+')}")
    expect(page.locator(".sentence span").first).to_have_text(sentence)
    assert page.locator("#answers img").count() == 0


def test_page_shows_errors_next_to_their_input(seen: Seen) -> None:
    page, alert = seen.open(), seen.page.get_by_role("alert")
    seen.send("person opens the door")
    expect(alert).to_contain_text("Choose a video first")
    page.get_by_label("Video", exact=True).fill("nobody")
    expect(page.locator("#videos")).to_contain_text("No name of a video contains this text")
    seen.choose(UNSHOWN)
    seen.send("zork")
    expect(alert).to_contain_text("'zork'")
    assert page.locator(".track").count() == 0
    seen.ask("person opens the zork")
    expect(alert).to_be_hidden()
    expect(page.locator(".reason")).to_contain_text("Unknown words, ignored: zork.")
    expect(page.locator(".reason .doubt")).to_be_visible()
    page.route("**/v1/ground", lambda route: route.abort())
    seen.send("person opens the door")
    expect(alert).to_contain_text("cannot be reached")
    page.unroute("**/v1/ground")
    page.route("**/v1/ground", lambda route: route.fulfill(json=[{"query": "x", "video": "y", "moments": []}]))
    page.keyboard.press("Enter")
    expect(seen.answers.last).to_contain_text("No moment found.")
    seen.open("#video=nobody")
    page.reload()
    expect(alert).to_contain_text("'nobody'")


def test_uploaded_features_can_be_queried_on_the_page(seen: Seen, tmp_path: Path) -> None:
    (tmp_path / "kitchen.npy").write_bytes(npy(np.random.default_rng(0).random((40, 32), np.float32)))
    page = seen.open()
    seen.upload(tmp_path / "kitchen.npy")
    assert page.evaluate("document.activeElement.id") == "duration"
    page.keyboard.type("12.5")
    page.keyboard.press("Enter")
    expect(page.locator("#sending")).to_be_hidden()
    assert page.get_by_label("Video", exact=True).input_value() == "kitchen"
    seen.ask("person opens the door")
    assert page.locator("#axis span").last.inner_text() == "0:12.5"


def test_uploaded_video_can_be_played_and_queried(seen: Seen, tmp_path: Path) -> None:
    page = seen.open()
    seen.upload(film(tmp_path / "mine.webm", scene(40), rate=10))
    expect(page.locator("#sending")).to_be_hidden()
    seen.ask("person opens the door")
    expect(page.locator("#axis span").last).to_have_text("0:04.0")
    until(page, "document.querySelector('#player').readyState >= 1")
    (tmp_path / "bad.npy").write_bytes(b"x")
    seen.upload(tmp_path / "bad.npy")
    page.get_by_label("Duration").fill("3")
    page.get_by_role("button", name="Upload", exact=True).click()
    expect(page.locator("#sending-problem")).to_contain_text("NumPy")
    page.get_by_role("button", name="Cancel").click()


def test_damaged_video_is_grounded_with_partial_checked(seen: Seen, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 48, 64, 3), np.uint8)
    damaged = holed(film(tmp_path / "whole.mp4", noise), tmp_path / "hole.mp4", 30)
    page = seen.open()
    checkbox = page.get_by_label("use what can be decoded")
    page.get_by_role("button", name="Upload a video").click()
    expect(checkbox).to_be_hidden()
    (tmp_path / "x.npy").write_bytes(b"x")
    page.get_by_label("File").set_input_files(tmp_path / "x.npy")
    expect(checkbox).to_be_hidden()
    page.get_by_label("File").set_input_files(damaged)
    page.get_by_role("button", name="Upload", exact=True).click()
    expect(page.locator("#problem")).to_contain_text("partial")
    page.get_by_role("button", name="Upload a video").click()
    page.get_by_label("File").set_input_files(damaged)
    expect(checkbox).not_to_be_checked()
    checkbox.check()
    page.get_by_role("button", name="Upload", exact=True).click()
    expect(page.locator("#sending")).to_be_hidden()
    seen.ask("person opens the door")


def test_page_requests_and_remembers_the_api_key(browser: Browser, locked: Running) -> None:
    with opened(browser, locked) as seen:
        page = seen.open()
        expect(page.locator("#locked-problem")).to_be_hidden()
        page.get_by_label("Key", exact=True).fill("wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#locked-problem")).to_be_visible()
        page.get_by_label("Key", exact=True).fill(KEY)
        page.keyboard.press("Enter")
        expect(page.locator("#locked")).to_be_hidden()
        expect(page.locator(".example video")).to_have_count(1)
        seen.choose(SHOWN)
        seen.ask("person opens the door")
        until(page, "document.querySelector('#player').readyState >= 2")
        page.reload()
        expect(page.locator(".track .bar")).to_have_count(5)


def test_docs_page_describes_all_routes(seen: Seen) -> None:
    page = seen.open("docs")
    expect(page.locator("article").first).to_contain_text("POST")
    text = page.locator("main").inner_text()
    for words in ("/v1/ground", "/v1/videos/{video}/media", "/healthz", "multipart/form-data", "top_k", "features"):
        assert words in text
