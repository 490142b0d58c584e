"""`python -m runtime.extract`: video files become clip features in the published layout."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import tyro

from runtime.backends.base import Device
from runtime.core.cli import command, suggest_next_command
from runtime.core.errors import GroundingError, VideoFileError, excerpt
from runtime.core.io.atomic_files import check_writable, locked, write_json
from runtime.core.io.input_files import merges_names, read_json
from runtime.core.names import folded
from runtime.core.video import ClipTiming
from runtime.datasets.charades_sta import DURATIONS, FRAMES
from runtime.datasets.dataset import FEATURE_DIRECTORY, NOTES
from runtime.datasets.validation import MAX_NAME_BYTES, file_stem, is_file_name
from runtime.media.container import check_one_file
from runtime.media.extraction import (
    BATCH_SIZE,
    FORMAT,
    Extracted,
    check_length,
    extract_if_needed,
    extractor_key,
    hash_of,
    read_note,
)
from runtime.media.extractors import Extractor, open_extractor
from runtime.media.video_file import VideoFile, probe

log = logging.getLogger("drn")

# Control characters of Unicode, and its line and paragraph separators.
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


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

    The name of a video is its file name without the extension. Videos whose features are already in the directory,
    from the same file content and the same extractor, are skipped; repeat the same command to resume. A directory
    contains the features of one extractor: with another extractor, extract all its videos in one command, or use
    another directory.

    Example:
        python -m runtime.extract clips/*.mp4 --extractor c3d.onnx --output features

    Args:
        videos: video files: mp4, mkv, webm, avi and all other formats that FFmpeg reads.
        extractor: .onnx file from `export.to_onnx`, .engine file from `export.build_engine`, or an image encoder
            with its description file.
        output: directory for the features; features of other videos in it are preserved.
        partial: accept damaged videos, and use the frames that can be decoded.
        batch_size: number of clips per batch.
        device: auto, cpu or cuda, for the extractor.
        threads: number of CPU threads.
    """
    if not videos:
        raise VideoFileError("No video was given; name the files to extract.", code="missing_option")
    if batch_size < 1:
        raise GroundingError(f"--batch-size must be at least 1, and {batch_size} was given.", code="invalid_option")
    _check_names(videos, output)
    network = open_extractor(extractor, device, threads)
    maker = extractor_key(network)
    check_writable(output / NOTES)
    notes, names = _notes(output), {path.stem for path in videos}
    _check_extractors(output, notes, names, maker)
    hashes, footages = _probe_all(videos, output, notes, network, maker, partial)
    for path in videos:
        target = output / FEATURE_DIRECTORY / f"{path.stem}.npy"
        result = extract_if_needed(
            path,
            network,
            target,
            hashes[path],
            maker,
            known=notes.get(path.stem),
            partial=partial,
            batch_size=batch_size,
            threads=threads,
            footage=footages.get(path),
        )
        _note(output, path.stem, result, names)
        print(
            f"{path.stem}  {result.num_clips} clips of {network.manifest.dim} channels, {result.num_frames} frames, "
            f"{result.duration:.2f} s"
        )
    first = videos[0].stem
    # A name that begins with a hyphen would be read as an option.
    video = (f"--video={first}",) if first.startswith("-") else ("--video", first)
    suggest_next_command("runtime.infer", "--model", "drn.onnx", "--data", output, *video, "--query", "a sentence")
    return output


def _probe_all(
    videos: Sequence[Path],
    output: Path,
    notes: Mapping[str, Extracted],
    network: Extractor,
    maker: str,
    partial: bool,
) -> tuple[dict[Path, str], dict[Path, VideoFile]]:
    """Look at every file before the first is extracted, which may take hours.

    Returns:
        The hash of each file, and the video files to extract.

    Raises:
        VideoFileError: a file cannot be decoded, or its name belongs to another video of the directory.
    """
    hashes = {path: hash_of(path) for path in videos}
    clock = ClipTiming(network.manifest.window, network.manifest.stride)
    footages: dict[Path, VideoFile] = {}
    for path, content in hashes.items():
        known = notes.get(path.stem)
        if known is not None and known.video != content:
            raise VideoFileError(
                f"{output} holds another video called {excerpt(path.stem)} already; rename {path}, or choose "
                "another --output.",
                code="ambiguous_video_name",
            )
        if known is None or not known.serves(content, maker, partial):
            footages[path] = video_file = probe(path)
            # A video that was cut off is short because of that.
            video_file.check_whole(partial)
            check_length(video_file, clock)
        else:
            check_one_file(path)
    return hashes, footages


def _notes(directory: Path) -> dict[str, Extracted]:
    """Return what is known of the videos in a directory."""
    path = directory / NOTES
    if not path.is_file():
        return {}
    value = read_json(path, "notes on extracted videos")
    videos = value.get("videos") if isinstance(value, dict) and value.get("format") == FORMAT else None
    if not isinstance(videos, dict):
        raise VideoFileError(f"{path} was changed since it was written; remove it.", code="digest_mismatch")
    notes = {name: read_note(note, path) for name, note in videos.items()}
    return {name: note for name, note in notes.items() if note is not None}


def _check_names(videos: Sequence[Path], output: Path) -> None:
    """Raise VideoFileError if a data set in `output` could not hold the names of the videos.

    The code is `invalid_video_name`, or `ambiguous_video_name` where the features of two videos would be one file.
    """
    fold = folded if merges_names(output) else str
    called: dict[str, Path] = {}
    for path in videos:
        if not is_file_name(path.stem) or _CONTROLS.search(path.stem):
            raise VideoFileError(
                f"The file {excerpt(path.name)} cannot give its video a name. Rename it, with at most "
                f"{MAX_NAME_BYTES} bytes of UTF-8 before the ending, and no control character or line break.",
                code="invalid_video_name",
            )
        stem = fold(file_stem(path.stem))
        if stem in called:
            raise VideoFileError(
                f"{called[stem]} and {path} would both be called {excerpt(stem)} in {output}; rename one of them.",
                code="ambiguous_video_name",
            )
        called[stem] = path
    for name in _table(output / DURATIONS):
        same = called.get(fold(file_stem(name)))
        if same is not None and same.stem != name:
            raise VideoFileError(
                f"{output} holds a video called {excerpt(name)}, from which {excerpt(same.stem)} could not be "
                f"distinguished. Rename {same}, or choose another --output.",
                code="ambiguous_video_name",
            )


def _check_extractors(directory: Path, notes: Mapping[str, Extracted], names: Set[str], maker: str) -> None:
    """Raise VideoFileError (code `mixed_extractors`) if features of another extractor would stay in the directory.

    Args:
        directory: of the notes, for the message.
        notes: by video.
        names: videos whose features are replaced.
        maker: `extractor_key`.
    """
    others = sorted(name for name, note in notes.items() if note.extractor != maker and name not in names)
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise VideoFileError(
            f"{directory} holds features of {excerpt(others[0])}{more} by another extractor, or by an earlier version "
            "of this package. Choose another --output, remove the directory, or give the files of all its videos to "
            "extract them again.",
            code="mixed_extractors",
        )


def _note(directory: Path, name: str, found: Extracted, names: Set[str]) -> None:
    """Add a video to the tables of the directory. The note comes last: with it, all the rest is there."""
    # Several processes may fill one directory.
    with locked(directory, wait=True):
        noted = _notes(directory)
        _check_extractors(directory, noted, names, found.extractor)
        for table, value in (
            (DURATIONS, found.duration),
            ("Charades_fps_dict.json", f"{found.frame_rate:.6g}"),
            (FRAMES, found.num_frames),
        ):
            _merge(directory / table, name, value)
        notes = {**noted, name: found}
        write_json(
            directory / NOTES,
            {"format": FORMAT, "videos": {key: note.to_dict() for key, note in sorted(notes.items())}},
        )


def _table(path: Path) -> dict[str, Any]:
    """Return a table of the directory, empty where there is none."""
    table = read_json(path, "table of videos") if path.is_file() else {}
    if not isinstance(table, dict):
        raise VideoFileError(
            f"{path} should be a table of videos and is not; choose another --output.", code="unexpected_structure"
        )
    return table


def _merge(path: Path, name: str, value: Any) -> None:
    table = _table(path)
    if table.get(name) != value:
        write_json(path, {**table, name: value})


if __name__ == "__main__":
    command(extract)
