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
    """Ground queries in one video: clip features, a video of a data set, or a video file.

    Example:
        python -m runtime.infer --model drn.onnx --features 3MSZA.npy --duration 30.96 --query "person opens the door"

    Args:
        model: .onnx, .engine or .pt file, or triton://HOST:PORT/MODEL for a model served by Triton
            (docs/triton.md).
        query: one or more sentences.
        features: .npy, .npz or .pt file of clip features, shape (num_clips, D).
        duration: duration of the video of --features, in seconds.
        num_frames: number of frames of that video. Default: estimated from the number of clips.
        data: directory of a data set. docs/formats.md lists the formats.
        video: name of a video in --data; with --extractor, a video file.
        extractor: .onnx or .engine file that extracts the clip features of a video file. The features are cached in
            the user's cache directory (or DRN_CACHE).
        partial: accept a damaged video file, and use the frames that can be decoded.
        footage: video file that the features of --features or --data belong to, for --plot and --cut.
        window: window length in seconds. A longer video is grounded in overlapping windows, and their results are
            merged; 0 turns windows off. Default: set by the model.
        overlap: overlap of adjacent windows, in seconds. Default: set by the model, or half a window.
        always_answer: print the best moments even if their score is below the model's no-match threshold.
        top_k: maximum number of moments per query.
        format: output format; srt contains the best moment of each query.
        plot: PNG file to draw the moments in, on the time axis of the video.
        cut: directory to write the best moment of each query to, as an mp4 file.
        device: auto, cpu or cuda.
        threads: number of CPU threads.
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
