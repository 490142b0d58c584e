"""`python -m runtime.infer`: when in this video does this sentence happen?"""

from __future__ import annotations

import shutil
from pathlib import Path

from runtime.annotations import DataSet
from runtime.backends import Device
from runtime.command import command, next_command
from runtime.errors import GroundingError, QueryError
from runtime.extraction import cached_video
from runtime.extractors import open_extractor
from runtime.files import check_writable
from runtime.grounder import Grounder
from runtime.timeline import Answer, Format, draw, render
from runtime.videos import Video


def infer(
    model: Path,
    query: tuple[str, ...],
    *,
    features: Path | None = None,
    duration: float | None = None,
    num_frames: int | None = None,
    data: Path | None = None,
    video: str | None = None,
    extractor: Path | None = None,
    partial: bool = False,
    top_k: int = 5,
    format: Format = "text",
    plot: Path | None = None,
    device: Device = "auto",
    threads: int | None = None,
) -> list[Answer]:
    """Ground sentences in one video: a feature file with its duration, a video of a data set, or a video file.

    Args:
        model: .onnx or .pt file.
        query: one or more sentences.
        features: .npy or .pt file of clip features, (num_clips, D).
        duration: of that video, in seconds.
        num_frames: of that video; taken from the number of clips when not given.
        data: directory in the Charades-STA layout.
        video: name of a video in it; with --extractor a video file.
        extractor: .onnx file that makes the clip features of a video file. They are kept in the user's cache directory
            (or DRN_CACHE), so that asking again costs nothing.
        partial: use what can be decoded of a damaged video file.
        top_k: most moments for each query.
        format: how moments are printed; srt holds the best of each query.
        plot: PNG file for the moments on the video's time line.
        device: auto, cpu or cuda.
        threads: CPU threads.
    """
    if top_k < 1:
        raise GroundingError(f"--top-k must be at least 1, and {top_k} was given.")
    if not query:
        raise QueryError('Nothing was asked; pass --query "a sentence".')
    if partial and extractor is None:
        raise GroundingError("--partial is about a video file; pass --video FILE --extractor ONNX, or leave it out.")
    check_writable(plot, model, features, extractor, video if extractor else None)
    grounder = Grounder.load(model, device, threads)
    truths: dict[str, tuple[float, float]] = {}
    clock = grounder.manifest.features.clock
    if extractor is not None and video is not None and features is None and data is None:
        if duration is not None or num_frames is not None:
            raise GroundingError("A video file tells its duration and frames; leave --duration and --num-frames out.")
        network = open_extractor(extractor, device, threads)
        network.manifest.check_fits(grounder.manifest.features)
        subject = cached_video(Path(video), network, extractor, partial=partial, threads=threads)
    elif extractor is not None:
        raise GroundingError("--extractor makes features of a video file; pass --video FILE with it, and nothing else.")
    elif features is not None and data is None and video is None:
        if duration is None:
            raise GroundingError("--features needs --duration, the length of that video in seconds.")
        subject = Video.load(features, duration, num_frames, clock=clock)
    elif data is not None and video is not None and features is None:
        if duration is not None or num_frames is not None:
            raise GroundingError(
                "--data knows the duration and frames of its videos; leave --duration and --num-frames out."
            )
        data_set = DataSet(data)
        subject = data_set.video(video)
        truths = _truths(data_set, video)
    else:
        raise GroundingError(
            "Say which video: either --features FILE --duration SECONDS, or --data DIR --video NAME, or --video FILE "
            "--extractor ONNX."
        )
    found = grounder.ground_batch([(subject, sentence) for sentence in query], top_k)
    answers = [
        Answer(sentence, subject.name, subject.duration, moments, truths.get(sentence))
        for sentence, moments in zip(query, found)
    ]
    print(render(answers, format, shutil.get_terminal_size((100, 24)).columns))
    if plot:
        draw(answers, plot)
    next_command("runtime.evaluate", "--model", model, "--data", data or "DIR")
    return answers


def _truths(data_set: DataSet, video: str) -> dict[str, tuple[float, float]]:
    """Return the moments that the data set gives for this video's sentences, cut off at its end."""
    truths = {}
    for split in ("train", "test"):
        if data_set.annotations_path(split).is_file():
            for annotation in data_set.annotations(split, invalid="keep", quiet=True):
                if annotation.video == video and annotation.start < annotation.end:
                    end = min(annotation.end, data_set.durations[video])
                    truths[annotation.sentence] = (annotation.start, end)
    return truths


if __name__ == "__main__":
    command(infer)
