"""`python -m runtime.extract`: extract clip features of video files into a data set directory."""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, TypeVar

import tyro

from runtime.backends.base import Device
from runtime.core.cli import command, report_many_written, report_written, suggest_next_command
from runtime.core.errors import CheckFailed, VideoFileError, check_option, excerpt
from runtime.core.io.atomic_files import check_writable, locked, write_json
from runtime.core.io.input_files import merges_names, read_json
from runtime.core.io.text_files import check_format
from runtime.core.names import folded
from runtime.core.pooling import ClipTiming
from runtime.datasets.charades_sta import DURATIONS, FRAMES
from runtime.datasets.dataset import FEATURE_DIRECTORY, NOTES
from runtime.datasets.validation import MAX_NAME_BYTES, file_stem, is_file_name
from runtime.media.container import check_one_file
from runtime.media.extraction import (
    BATCH_SIZE,
    FORMAT,
    Extraction,
    ExtractionRecord,
    check_length,
    hash_of,
    read_record,
)
from runtime.media.extractors import open_extractor
from runtime.media.video_file import VideoFile, probe
from runtime.media.video_folder import videos_in

log = logging.getLogger("drn")

T = TypeVar("T")

# Control characters, and the line and paragraph separators of Unicode.
_CONTROL_CHARACTERS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def extract(
    videos: tyro.conf.Positional[tuple[Path, ...]],
    /,
    extractor: Path,
    output: Path,
    *,
    partial: bool = False,
    batch_size: int = BATCH_SIZE,
    device: Device = "auto",
    threads: int | None = None,
) -> Path:
    """Extract clip features of videos into a directory in the published Charades-STA layout.

    Of a directory, all video files are extracted, also those in subdirectories. If one of these is damaged, the
    command reports the file, extracts the others, and exits with 1. If a damaged file is an argument itself, the
    command stops before the first extraction.

    The name of a video is its file name without the extension. Videos whose features are already in the directory,
    from the same file content and the same extractor, are skipped; repeat the same command to resume. A directory
    contains the features of one extractor: with another extractor, extract all its videos in one command, or use
    another directory.

    Example:
        python -m runtime.extract videos --extractor c3d.onnx --output features

    Args:
        videos: video files: mp4, mkv, webm, avi and all other formats that FFmpeg reads; or directories of them.
        extractor: .onnx file from `export.to_onnx`, .engine file from `export.build_engine`, or an image encoder in
            ONNX with its description file (docs/your-own-video.md).
        output: directory for the features; features of other videos in it are preserved.
        partial: accept damaged videos, and use the frames that can be decoded.
        batch_size: number of clips per batch.
        device: device that runs the extractor; auto selects cuda if it is available.
        threads: number of CPU threads. Default: set by FFmpeg and by the library that runs the extractor.
    """
    if not videos:
        raise VideoFileError("No video was given. Name the video files to extract.", code="missing_option")
    check_option("--batch-size", batch_size, 1)
    listed = {file: path.is_dir() for path in videos for file in (videos_in(path) if path.is_dir() else [path])}
    _check_names(list(listed), output)
    extraction = Extraction(open_extractor(extractor, device, threads), partial, batch_size, threads)
    check_writable(output / NOTES)
    extracted, features, tables = _extract_all(listed, _Job(extraction, output, _records(output)))
    report_many_written("feature", features)
    report_written(*tables)
    failed = len(listed) - extracted
    if failed:
        raise CheckFailed(
            f"{failed} of {len(listed)} videos cannot be extracted, as reported above; {output} contains the others. "
            "Repair or remove these files, and run the same command again.",
            code="videos_failed",
        )
    first = next(iter(listed)).stem
    # As a separate word, a name that starts with a hyphen would be an option.
    video = (f"--video={first}",) if first.startswith("-") else ("--video", first)
    suggest_next_command("runtime.infer", "--model", "drn.onnx", "--data", output, *video, "--query", "a sentence")
    return output


@dataclasses.dataclass(frozen=True)
class _Job:
    """The extraction, and the output directory with its records by video."""

    extraction: Extraction
    output: Path
    records: Mapping[str, ExtractionRecord]


def _extract_all(videos: Mapping[Path, bool], job: _Job) -> tuple[int, list[Path], list[Path]]:
    """Extract videos, and skip damaged ones of directories.

    Every file is checked before the first is extracted, which may take hours.

    Args:
        videos: files, and whether to skip a file that cannot be decoded.

    Returns:
        The number of videos whose features are in the directory, and the feature files and tables that were written.

    Raises:
        VideoFileError: a file that must not be skipped cannot be decoded, or features of another extractor would
            remain in the directory.
    """
    extraction = job.extraction
    _check_extractors(job.output, job.records, {path.stem for path in videos}, extraction.key)
    checked = {}
    for path, skip in videos.items():
        video = _unless_damaged(skip, functools.partial(_check, path, job))
        if video is not None:
            checked[path] = video
    names = {path.stem for path in checked}
    _check_extractors(job.output, job.records, names, extraction.key)
    extracted = 0
    features: list[Path] = []
    tables: dict[Path, None] = {}
    for path, (video_hash, video_file) in checked.items():
        output, known = job.output / FEATURE_DIRECTORY / f"{path.stem}.npy", job.records.get(path.stem)
        update = functools.partial(extraction.update, path, output, video_hash, known, video_file)
        record = _unless_damaged(videos[path], update)
        if record is None:
            continue
        extracted += 1
        # Features that are still valid keep their record.
        if record is not known:
            features.append(output)
        tables |= dict.fromkeys(_add_record(job.output, path.stem, record, names))
        clips = f"{record.num_clips} clips of {extraction.extractor.manifest.dim} channels"
        print(f"{path.stem}  {clips}, {record.num_frames} frames, {record.duration:.2f} s")
    return extracted, features, list(tables)


def _unless_damaged(skip: bool, function: Callable[[], T]) -> T | None:
    """Return the result of a function; if `skip` is set, log a VideoFileError and return None."""
    try:
        return function()
    except VideoFileError as error:
        if not skip:
            raise
        log.warning("Skipped: %s", error)
        return None


def _check(path: Path, job: _Job) -> tuple[str, VideoFile | None]:
    """Check that a video can be decoded, and return its SHA-256, and its open file if it must be extracted.

    Raises:
        VideoFileError: the file cannot be decoded, or its name belongs to another video of the directory.
    """
    video_hash = hash_of(path)
    known = job.records.get(path.stem)
    if known is not None and known.video != video_hash:
        raise VideoFileError(
            f"{job.output} already contains another video with the name {excerpt(path.stem)}. Rename {path}, or choose "
            "another --output.",
            code="ambiguous_video_name",
        )
    extraction, manifest = job.extraction, job.extraction.extractor.manifest
    if known is not None and known.is_valid_for(video_hash, extraction.key, extraction.partial):
        check_one_file(path)
        return video_hash, None
    video_file = probe(path)
    # A truncated video may be too short, so its damage is reported first.
    video_file.check_undamaged(extraction.partial)
    check_length(video_file, ClipTiming(manifest.window, manifest.stride))
    return video_hash, video_file


def _records(directory: Path) -> dict[str, ExtractionRecord]:
    path = directory / NOTES
    if not path.is_file():
        return {}
    value = read_json(path, "records of extracted videos")
    check_format(value, FORMAT, f"{path}", VideoFileError, "remove the file")
    videos = value.get("videos")
    if not isinstance(videos, dict):
        raise VideoFileError(
            f"{path}: expected a table of videos, got {excerpt(videos)}. Remove the file.", code="damaged_file"
        )
    records = {name: read_record(item, path) for name, item in videos.items()}
    return {name: record for name, record in records.items() if record is not None}


def _check_names(videos: Sequence[Path], output: Path) -> None:
    """Raise VideoFileError if a name is invalid (`invalid_video_name`) or not unique (`ambiguous_video_name`)."""
    fold = folded if merges_names(output) else str
    paths: dict[str, Path] = {}
    for path in videos:
        if not is_file_name(path.stem) or _CONTROL_CHARACTERS.search(path.stem):
            raise VideoFileError(
                f"The file name {excerpt(path.name)} is not a valid name of a video. Rename the file, with at most "
                f"{MAX_NAME_BYTES} bytes of UTF-8 before the suffix, and without control characters.",
                code="invalid_video_name",
            )
        stem = fold(file_stem(path.stem))
        if stem in paths:
            raise VideoFileError(
                f"{paths[stem]} and {path} would have the same name {excerpt(stem)} in {output}. Rename one file.",
                code="ambiguous_video_name",
            )
        paths[stem] = path
    for name in _table(output / DURATIONS):
        conflict = paths.get(fold(file_stem(name)))
        if conflict is not None and conflict.stem != name:
            raise VideoFileError(
                f"{output} contains a video {excerpt(name)}, whose files would be the same as those of "
                f"{excerpt(conflict.stem)}. Rename {conflict}, or choose another --output.",
                code="ambiguous_video_name",
            )


def _check_extractors(
    directory: Path, records: Mapping[str, ExtractionRecord], names: Set[str], extractor_hash: str
) -> None:
    """Raise VideoFileError (code `mixed_extractors`) if features of another extractor would remain in the directory.

    Args:
        names: videos whose features are replaced.
    """
    others = sorted(
        name for name, record in records.items() if record.extractor != extractor_hash and name not in names
    )
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise VideoFileError(
            f"{directory} contains features of {excerpt(others[0])}{more} from another extractor or an earlier version "
            "of this package. Choose another --output, or extract all videos of this directory in one command.",
            code="mixed_extractors",
        )


def _add_record(directory: Path, name: str, record: ExtractionRecord, names: Set[str]) -> list[Path]:
    """Add a video to the tables of the directory, and return the files that changed.

    The record is written last, when all other files are complete.
    """
    changed = []
    # Several processes may write to one directory.
    with locked(directory, wait=True):
        records = _records(directory)
        _check_extractors(directory, records, names, record.extractor)
        for table, value in (
            (DURATIONS, record.duration),
            ("Charades_fps_dict.json", f"{record.frame_rate:.6g}"),
            (FRAMES, record.num_frames),
        ):
            known = _table(directory / table)
            if known.get(name) != value:
                write_json(directory / table, {**known, name: value})
                changed.append(directory / table)
        if records.get(name) != record:
            videos = {key: item.to_dict() for key, item in sorted({**records, name: record}.items())}
            write_json(directory / NOTES, {"format": FORMAT, "videos": videos})
            changed.append(directory / NOTES)
    return changed


def _table(path: Path) -> dict[str, Any]:
    """Return a table of the directory; empty if there is none."""
    table = read_json(path, "table of videos") if path.is_file() else {}
    if not isinstance(table, dict):
        raise VideoFileError(f"{path} is not a table of videos. Choose another --output.", code="unexpected_structure")
    return table


if __name__ == "__main__":
    command(extract)
