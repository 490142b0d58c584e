"""`python -m runtime.infer`: ground queries in one video."""

from __future__ import annotations

import dataclasses
import logging
import math
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from runtime.backends import is_address
from runtime.backends.base import Device
from runtime.core.cli import check_plots, command, report_written, suggest_next_command
from runtime.core.errors import GroundingError, QueryError, check_option, excerpt
from runtime.core.io.atomic_files import check_report, check_writable
from runtime.core.moments import Moment
from runtime.core.sliding_windows import resolve_windows
from runtime.core.video import Video
from runtime.datasets.dataset import DataSet
from runtime.grounding.formatting import Answer, Format, format_answers
from runtime.grounding.grounder import Grounder
from runtime.grounding.plotting import draw
from runtime.grounding.video_source import VideoArguments, VideoSource, open_video_source
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
        query: one or more sentences, each in quotes.
        features: .npy, .npz or .pt file of clip features, shape (num_clips, D).
        duration: duration of the video of --features, in seconds; required with --features.
        num_frames: number of frames of the video of --features. Default: estimated from the number of clips.
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
        device: device that runs the model; auto selects cuda if it is available.
        threads: number of CPU threads. Default: set by the library that runs the model.
    """
    source = VideoArguments(features, duration, num_frames, data, video, extractor, partial, footage)
    options = Options(model, query, source, window, overlap, always_answer, top_k, plot, cut, device, threads)
    answers = run(options)
    print(format_answers(answers, format, shutil.get_terminal_size((100, 24)).columns))
    if extractor:
        suggest_next_command("runtime.serve", "--model", model, "--extractor", extractor)
    else:
        suggest_next_command("runtime.evaluate", "--model", model, "--data", data or "DIR")
    return answers


@dataclasses.dataclass(frozen=True)
class Options:
    """The arguments of `infer` except the output format; `source` contains the arguments that select the video."""

    model: str | Path
    query: tuple[str, ...]
    source: VideoArguments
    window: float | None
    overlap: float | None
    always_answer: bool
    top_k: int
    plot: Path | None
    cut: Path | None
    device: Device
    threads: int | None


def run(options: Options) -> list[Answer]:
    """Ground the queries, and write the plot and the clips.

    The caller prints the answers last: if a frame for the plot or a clip is damaged, the command fails without output.
    """
    clips = _check(options)
    # With a model on a server and a local extractor, device and threads apply to the extractor only.
    extracts_only = options.source.extractor is not None and is_address(options.model)
    arguments = () if extracts_only else (options.device, options.threads)
    grounder = Grounder.load(options.model, *arguments)
    grounder.windows = resolve_windows(grounder.windows, options.window, options.overlap)
    _warn_of_single_words(options.query)
    # Queries are checked before the extraction, which may take hours. Unknown words are reported by `ground_batch`.
    for sentence in options.query:
        grounder.encode_query(sentence, Counter())
    source = open_video_source(options.source, grounder.manifest.features, options.device, options.threads)
    answers = _ground(grounder, source, options)
    if options.plot:
        draw(answers, options.plot, source.video_file, partial=options.source.partial)
        report_written(options.plot)
    _write_best(source, answers, clips, options)
    return answers


def _check(options: Options) -> list[Path]:
    """Raise GroundingError for arguments that cannot be used, and return the files for the best moments."""
    check_option("--top-k", options.top_k, 1)
    if not options.query:
        raise QueryError('No query was given. Pass --query "a sentence".', code="missing_option")
    source = options.source
    source.check()
    data_files = DataSet(source.data).files if source.data and options.plot else ()
    inputs = (options.model, source.features, source.extractor, source.video_path, *data_files)
    check_report(options.plot, *inputs)
    check_plots(options.plot)
    clips = _clips(source, options.cut, options.query)
    for clip in clips:
        check_writable(clip, options.plot, *inputs)
    return clips


def _ground(grounder: Grounder, source: VideoSource, options: Options) -> list[Answer]:
    video = source.video
    windows = grounder.cut(video)
    if len(windows) > 1:
        log.info(
            "%s lasts %.1f s and is grounded in %d windows of %.1f s with an overlap of %.1f s.",
            *(video.name, video.duration, len(windows), windows[0].duration, windows[0].end - windows[1].start),
        )
    pairs = [(video, sentence) for sentence in options.query]
    # Moments below the no-match threshold are needed for their score.
    result = grounder.ground_batch(pairs, options.top_k, presence=False)
    presence, answers = grounder.manifest.presence, []
    for sentence, moments in zip(options.query, result):
        exist_score = None
        if presence is not None:
            is_likely = not _is_fallback(moments[0], video)
            exist_score = presence.exist_score(moments[0].score) if is_likely else 0.0
            if exist_score < 0.5 and not options.always_answer:
                moments = []
        if moments and _is_fallback(moments[0], video):
            log.info("No location of %s is likely for %s; the answer is all of it.", video.name, excerpt(sentence))
        answers.append(Answer(sentence, video.name, video.end, moments, source.truths_of(sentence), exist_score))
    return answers


def _is_fallback(moment: Moment, video: Video) -> bool:
    """Return whether a moment is the entire video with score 1, the answer without a likely location."""
    # A server may round times to float32.
    times = (moment.start, video.offset), (moment.end, video.offset + video.duration)
    return moment.score == 1 and all(math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-6) for a, b in times)


def _write_best(source: VideoSource, answers: Sequence[Answer], clips: Sequence[Path], options: Options) -> None:
    """Write the best moment of each query to its file."""
    best = [(answer.moments[0], clip) for answer, clip in zip(answers, clips) if answer.moments]
    if not best:
        return
    assert source.video_file is not None
    offset = source.video_file.offset
    spans = [(max(0.0, moment.start - offset), moment.end - offset) for moment, _ in best]
    files = [clip for _, clip in best]
    write_clips(source.video_file, spans, files, options.threads, partial=options.source.partial)
    report_written(*files)


def _warn_of_single_words(queries: Sequence[str]) -> None:
    """Warn if a sentence without quotes became one query per word."""
    if len(queries) > 1 and all(len(query.split()) == 1 for query in queries):
        log.warning(
            "Each of the %d words is a separate query. For one sentence, write --query %s.",
            *(len(queries), excerpt(" ".join(queries)).replace("'", '"')),
        )


def _clips(choice: VideoArguments, directory: Path | None, queries: tuple[str, ...]) -> list[Path]:
    """Return the file of each query's best moment; none without --cut."""
    if directory is None:
        return []
    if choice.video_path is None:
        raise GroundingError(
            "--cut needs a video file. Pass --video FILE --extractor FILE, or --footage FILE with the features.",
            code="missing_option",
        )
    check_encoder()
    return [directory / name for name in clip_names(choice.video_path.stem, queries)]


if __name__ == "__main__":
    command(infer)
