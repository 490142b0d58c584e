"""`python -m runtime.extract`: video files become clip features in the published layout."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import tyro

from runtime.annotations import FEATURE_DIRECTORY, NOTES
from runtime.backends import Device
from runtime.command import command, next_command
from runtime.errors import FootageError, GroundingError, excerpt
from runtime.extraction import (
    BATCH_SIZE,
    FORMAT,
    Extracted,
    check_length,
    extracted,
    extractor_key,
    hash_of,
    read_note,
)
from runtime.extractors import open_extractor
from runtime.files import check_writable, locked, read_json, write_json
from runtime.footage import check_one_file, look
from runtime.videos import ClipClock

log = logging.getLogger("drn")


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
    """Extract the clip features of videos into a directory in the published Charades-STA layout.

    A video is named after its file, without the ending. One whose features are there already and whole, of the same
    content and the same extractor, is passed over: the same command goes on after an interruption.

    Args:
        videos: video files: mp4, mkv, webm, avi and whatever else FFmpeg reads.
        extractor: .onnx file of `export.to_onnx`, .engine of `export.build_engine`, or an image encoder with its
            description beside it.
        output: directory to fill; others of its videos stay.
        partial: use what can be decoded of a damaged video.
        batch_size: clips at a time.
        device: auto, cpu or cuda, for the extractor.
        threads: CPU threads.
    """
    if not videos:
        raise FootageError("No video was given; name the files to extract.")
    if batch_size < 1:
        raise GroundingError(f"--batch-size must be at least 1, and {batch_size} was given.")
    twice = [name for name, count in Counter(path.stem for path in videos).items() if count > 1]
    if twice:
        both = " and ".join(str(path) for path in videos if path.stem == twice[0])
        raise FootageError(f"{both} would both be called {excerpt(twice[0])}; rename one of them.")
    network = open_extractor(extractor, device, threads)
    maker = extractor_key(network)
    check_writable(output / NOTES)
    notes = _notes(output)
    # Every file is looked at before the first is extracted, which may take hours.
    hashes = {path: hash_of(path) for path in videos}
    clock = ClipClock(network.manifest.window, network.manifest.stride)
    footages = {}
    for path, content in hashes.items():
        known = notes.get(path.stem)
        if known is not None and known.video != content:
            raise FootageError(
                f"{output} holds another video called {excerpt(path.stem)} already; rename {path}, or choose "
                "another --output."
            )
        if known is None or not known.serves(content, maker, partial):
            footages[path] = footage = look(path)
            check_length(footage, clock)
            footage.check_whole(partial)
        else:
            check_one_file(path)
    for path in videos:
        target = output / FEATURE_DIRECTORY / f"{path.stem}.npy"
        found = extracted(
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
        _note(output, path.stem, found)
        print(
            f"{path.stem}  {found.num_clips} clips of {network.manifest.dim} channels, {found.num_frames} frames, "
            f"{found.duration:.2f} s"
        )
    first = videos[0].stem
    next_command("runtime.infer", "--model", "drn.onnx", "--data", output, "--video", first, "--query", "a sentence")
    return output


def _notes(directory: Path) -> dict[str, Extracted]:
    """Return what is known of the videos in a directory."""
    path = directory / NOTES
    if not path.is_file():
        return {}
    value = read_json(path, "notes on extracted videos")
    videos = value.get("videos") if isinstance(value, dict) and value.get("format") == FORMAT else None
    if not isinstance(videos, dict):
        raise FootageError(f"{path} was changed since it was written; remove it.")
    notes = {name: read_note(note, path) for name, note in videos.items()}
    return {name: note for name, note in notes.items() if note is not None}


def _note(directory: Path, name: str, found: Extracted) -> None:
    """Add a video to the tables of the directory. The note comes last: with it, all the rest is there."""
    # Several processes may fill one directory.
    with locked(directory, wait=True):
        for table, value in (
            ("Charades_duration.json", found.duration),
            ("Charades_fps_dict.json", f"{found.frame_rate:.6g}"),
            ("Charades_frames_info.json", found.num_frames),
        ):
            _merge(directory / table, name, value)
        notes = {**_notes(directory), name: found}
        write_json(
            directory / NOTES,
            {"format": FORMAT, "videos": {key: note.to_dict() for key, note in sorted(notes.items())}},
        )


def _merge(path: Path, name: str, value: Any) -> None:
    table = read_json(path, "table of videos") if path.is_file() else {}
    if not isinstance(table, dict):
        raise FootageError(f"{path} should be a table of videos and is not; choose another --output.")
    if table.get(name) != value:
        write_json(path, {**table, name: value})


if __name__ == "__main__":
    command(extract)
