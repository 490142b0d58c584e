"""`python -m runtime.infer`: when in this video does this sentence happen?"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from runtime.backends import is_address
from runtime.backends.base import Device
from runtime.core.cli import check_plots, command, suggest_next_command
from runtime.core.errors import GroundingError, QueryError, excerpt
from runtime.core.io.atomic_files import check_report, check_writable
from runtime.core.sliding_windows import resolve_windows
from runtime.datasets.dataset import DataSet
from runtime.grounding.formatting import Answer, Format, format_answers
from runtime.grounding.grounder import Grounder
from runtime.grounding.plotting import draw
from runtime.grounding.video_source import VideoArguments, open_video_source
from runtime.media.clip_writer import check_encoder, clip_names
from runtime.media.clip_writer import write_clips as write_clips

log = logging.getLogger("drn")


def infer(
    model: str | Path,
    query: tuple[str, ...],
    *,
    features: Path | None = None,
    duration: float | None = None,
    num_frames: int | None = None,
    data: Path | None = None,
    video: str | None = None,
    extractor: Path | None = None,
    partial: bool = False,
    footage: Path | None = None,
    window: float | None = None,
    overlap: float | None = None,
    always_answer: bool = False,
    top_k: int = 5,
    format: Format = "text",
    plot: Path | None = None,
    cut: Path | None = None,
    device: Device = "auto",
    threads: int | None = None,
) -> list[Answer]:
    """Ground sentences in one video: a feature file with its duration, a video of a data set, or a video file.

    Args:
        model: .onnx, .engine or .pt file, or triton://HOST:PORT/MODEL of a model that Triton serves; docs/triton.md.
        query: one or more sentences.
        features: .npy, .npz or .pt file of clip features, (num_clips, D).
        duration: of that video, in seconds.
        num_frames: of that video; taken from the number of clips when not given.
        data: directory of a data set; docs/formats.md lists the formats.
        video: name of a video in it; with --extractor a video file.
        extractor: .onnx or .engine file that makes the clip features of a video file. They are kept in the user's cache
            directory (or DRN_CACHE), so that asking again costs nothing.
        partial: use what can be decoded of a damaged video file.
        footage: the video file that --features or --data were made of, for the frames of --plot and for --cut.
        window: seconds; a longer video is grounded in windows of this length, whose answers are merged. 0 grounds any
            video whole. The model's own when not given: it cuts videos longer than those it learnt from.
        overlap: seconds that neighbouring windows share; the model's own, or half a window, when not given.
        always_answer: also where nothing in the video fits, if the model carries a threshold below which it says so.
        top_k: most moments for each query.
        format: how moments are printed; srt holds the best of each query.
        plot: PNG file for the moments on the video's time line, over frames of the video where its file is given.
        cut: directory for the best moment of each query as an mp4 file.
        device: auto, cpu or cuda.
        threads: CPU threads.
    """
    if top_k < 1:
        raise GroundingError(f"--top-k must be at least 1, and {top_k} was given.", code="invalid_option")
    if not query:
        raise QueryError('Nothing was asked; pass --query "a sentence".', code="missing_option")
    choice = VideoArguments(features, duration, num_frames, data, video, extractor, partial, footage)
    choice.check()
    inputs = (model, features, extractor, choice.film, *(DataSet(data).files if data and plot else ()))
    check_report(plot, *inputs)
    if plot:
        check_plots(plot)
    clips = _clips(choice, cut, query)
    for clip in clips:
        check_writable(clip, plot, *inputs)
    # Where the model is a server's, device and threads are about what makes the features here.
    here = extractor is not None and is_address(model)
    grounder = Grounder.load(model) if here else Grounder.load(model, device, threads)
    grounder.windows = resolve_windows(grounder.windows, window, overlap)
    _warn_of_single_words(query)
    # Before features are made, which may take hours; unknown words are reported when the sentences are asked.
    for sentence in query:
        grounder.encode_query(sentence, Counter())
    chosen = open_video_source(choice, grounder.manifest.features, device, threads)
    requested = chosen.video
    windows = grounder.cut(requested)
    if len(windows) > 1:
        log.info(
            "%s lasts %.1f s and is grounded in %d windows of %.1f s, each of which shares %.1f s with the next.",
            *(requested.name, requested.duration, len(windows), windows[0].duration, windows[0].end - windows[1].start),
        )
    result = grounder.ground_batch([(requested, sentence) for sentence in query], top_k, presence=not always_answer)
    answers = [
        Answer(sentence, requested.name, requested.end, moments, chosen.truths_of(sentence))
        for sentence, moments in zip(query, result)
    ]
    # The answers come last: where a frame for the plot or a clip is damaged, the command fails without output.
    if plot:
        draw(answers, plot, chosen.footage, partial=partial)
    best = [(answer.moments[0], clip) for answer, clip in zip(answers, clips) if answer.moments]
    if best:
        assert chosen.footage is not None
        offset = chosen.footage.offset
        write_clips(
            chosen.footage,
            [(max(0.0, moment.start - offset), moment.end - offset) for moment, _ in best],
            [clip for _, clip in best],
            threads,
            partial=partial,
        )
        for _, clip in best:
            log.info("Cut:  %s", clip)
    print(format_answers(answers, format, shutil.get_terminal_size((100, 24)).columns))
    suggest_next_command("runtime.evaluate", "--model", model, "--data", data or "DIR")
    return answers


def _warn_of_single_words(queries: Sequence[str]) -> None:
    """Warn where a sentence without quotes became a query for each of its words."""
    if len(queries) > 1 and all(len(query.split()) == 1 for query in queries):
        log.warning(
            "Each of the %d words is a query of its own; for one sentence write --query %s.",
            *(len(queries), excerpt(" ".join(queries)).replace("'", '"')),
        )


def _clips(choice: VideoArguments, directory: Path | None, queries: tuple[str, ...]) -> list[Path]:
    """Return the file of each query's best moment; none where nothing is to be cut."""
    if directory is None:
        return []
    if choice.film is None:
        raise GroundingError(
            "--cut needs the video itself; pass --video FILE --extractor FILE, or --footage FILE beside the features.",
            code="missing_option",
        )
    check_encoder()
    return [directory / name for name in clip_names(choice.film.stem, queries)]


if __name__ == "__main__":
    command(infer)
