"""Read the clip features of a data set: one file per video, or one HDF5 file."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from runtime.core.errors import FeatureError, MissingFeatures, excerpt
from runtime.core.io.array_files import read_header
from runtime.core.io.digests import content_stamp, file_stamp
from runtime.core.io.hdf5_reader import Hdf5Reader
from runtime.core.io.input_files import check_directory, check_file
from runtime.core.names import by_fold, near_name
from runtime.core.video import load_features
from runtime.datasets.validation import file_stem, is_file_name

log = logging.getLogger("drn")

SUFFIXES = (".pt", ".npy", ".npz")
HDF5_SUFFIXES = (".h5", ".hdf5")


class FeatureStore(Protocol):
    """The clip features of many videos, by name. Every method raises MissingFeatures for a video that is not
    there, and FeatureError for one that cannot be read.

    Attributes:
        place: the directory, or the file.
    """

    place: Path

    def path(self, video: str) -> Path:
        """Return the file that holds a video."""

    def load(self, video: str) -> np.ndarray:
        """Return the features of a video, as stored."""

    def num_clips(self, video: str) -> int:
        """Return how many clips a video has, without reading them where the format allows it."""

    def stamp(self, video: str) -> tuple[Any, ...]:
        """Return what changes whenever the features of a video do: name, size and time of the file, the place in it,
        and a hash of samples of the content."""

    def file_stamp(self, video: str) -> tuple[Any, ...] | None:
        """Return what changes whenever the file that holds a video is written or replaced, without reading the file;
        None where there is none."""

    def content(self, video: str) -> bytes:
        """Return all that the features of a video are, to be hashed."""


class FeatureFiles:
    """A directory with a `.pt`, `.npy` or `.npz` file for each video; of several for one, the first of these counts."""

    def __init__(self, directory: Path) -> None:
        self.place = directory
        self._warned = False

    def path(self, video: str) -> Path:
        paths = [self.place / f"{name}{suffix}" for name in _spellings(video) for suffix in SUFFIXES]
        files = [path for path in paths if path.is_file()]
        if len(files) > 1 and not self._warned:
            self._warned = True
            log.warning(
                "%s holds %s for one video, and %s is used. Remove the others; further such videos are not listed.",
                self.place, " and ".join(path.name for path in files), files[0].name,
                extra={"code": "ambiguous_features"},
            )  # fmt: skip
        if files:
            return files[0]
        check_directory(self.place, f"There are no features of {excerpt(video)}: the directory", MissingFeatures)
        for path in paths:
            if path.exists():
                check_file(path, "The feature file", FeatureError)
        raise MissingFeatures(
            f"There are no features of {excerpt(video)}: {self.place / video}{SUFFIXES[0]} (or "
            f"{', '.join(SUFFIXES[1:])}) is missing." + near_name(self._names, *_spellings(video))
        )

    @functools.cached_property
    def _names(self) -> dict[str, str]:
        """Names of the files, without their suffix, for `near_name`: listed once, when a video is missing."""
        paths = (Path(name) for name in os.listdir(self.place))
        return by_fold(path.stem for path in paths if path.suffix in SUFFIXES)

    def load(self, video: str) -> np.ndarray:
        return load_features(self.path(video))

    def num_clips(self, video: str) -> int:
        path = self.path(video)
        if path.suffix == ".npy":
            # Whatever is wrong with the file, `load_features` reports it.
            with contextlib.suppress(Exception), open(path, "rb") as stream:
                return read_header(stream).shape[0]
        return len(load_features(path))

    def stamp(self, video: str) -> tuple[Any, ...]:
        path = self.path(video)
        return path.name, *content_stamp(path)

    def file_stamp(self, video: str) -> tuple[Any, ...] | None:
        for name in _spellings(video):
            for suffix in SUFFIXES:
                stamp = file_stamp(os.path.join(self.place, name + suffix))
                if stamp is not None:
                    return name, suffix, *stamp
        return None

    def content(self, video: str) -> bytes:
        return self.path(video).read_bytes()


class FeatureArchive:
    """One HDF5 file: a dataset (num_clips, D) named after each video, or a group of that name with one in it.

    Links within the file are followed. Links out of it, virtual datasets and values in external files are refused.
    """

    def __init__(self, file: Path) -> None:
        self.place = file
        self._reader = Hdf5Reader(file)

    def path(self, video: str) -> Path:
        self._reader.describe(_spellings(video))
        return self.place

    def load(self, video: str) -> np.ndarray:
        return self._reader.read(_spellings(video))

    def num_clips(self, video: str) -> int:
        return int(self._reader.describe(_spellings(video))["shape"][0])

    def stamp(self, video: str) -> tuple[Any, ...]:
        name = self._reader.describe(_spellings(video))["name"]
        return self.place.name, *content_stamp(self.place), name

    def file_stamp(self, video: str) -> tuple[Any, ...] | None:
        return file_stamp(self.place)

    def close(self) -> None:
        """End the process that reads the file, until it is read again."""
        self._reader.close()

    def content(self, video: str) -> bytes:
        features = self.load(video)
        return f"{features.dtype} {features.shape} ".encode() + features.tobytes()


def open_store(root: Path, location: Path | None) -> FeatureStore:
    """Return the features of the data set in a directory.

    Args:
        root: the directory.
        location: a directory or an HDF5 file; None for `features/` in the directory or, without it, its one HDF5 file.
            A `place` that is not there gives way to the one HDF5 file too.

    Raises:
        FeatureError: the directory holds several HDF5 files, or one beside `features/`.
    """
    if location is not None and location.suffix in HDF5_SUFFIXES:
        return FeatureArchive(location)
    directory = location or root / "features"
    archives = sorted(path for suffix in HDF5_SUFFIXES for path in root.glob(f"*{suffix}"))
    if len(archives) > 1 or (archives and directory.is_dir()):
        siblings = [path.name for path in archives] + ([f"{directory.name}/"] if directory.is_dir() else [])
        raise FeatureError(
            f"{root} holds features in {' and '.join(siblings)}; keep one of them.", code="ambiguous_features"
        )
    return FeatureArchive(archives[0]) if archives else FeatureFiles(directory)


def _spellings(video: str) -> list[str]:
    """Return how a video's features may be called: by its name, or without the suffix of a video file."""
    if not is_file_name(video):
        raise FeatureError(
            f"{excerpt(video)} cannot be the name of a video, as its features are found by it.",
            code="invalid_video_name",
        )
    return list(dict.fromkeys((video, file_stem(video))))
