"""Read the clip features of a data set from one file per video, or from one HDF5 file."""

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
    """The clip features of many videos by name.

    Every method raises MissingFeatures for a video without features, and FeatureError for features that cannot be read.

    Attributes:
        location: the directory, or the HDF5 file.
    """

    location: Path

    def path(self, video: str) -> Path:
        """Return the file with the features of a video."""

    def load(self, video: str) -> np.ndarray:
        """Return the features of a video, (num_clips, D) in the float type of the file."""

    def num_clips(self, video: str) -> int:
        """Return the number of clips of a video, without reading the features if the format allows it."""

    def stamp(self, video: str) -> tuple[Any, ...]:
        """Return a stamp of the features of a video that changes with their name, file, modification time or content.

        Of large files only samples are read; see `content_stamp`.
        """

    def file_stamp(self, video: str) -> tuple[Any, ...] | None:
        """Return a stamp that changes when the file of a video is written or replaced, without reading the file.

        None if there is no file.
        """

    def content(self, video: str) -> bytes:
        """Return the features of a video as bytes, for digests."""


class FeatureFiles:
    """A directory with a `.pt`, `.npy` or `.npz` file for each video, in this order of priority."""

    def __init__(self, directory: Path) -> None:
        self.location = directory
        self._warned = False

    def path(self, video: str) -> Path:
        paths = [self.location / f"{name}{suffix}" for name in _spellings(video) for suffix in SUFFIXES]
        files = [path for path in paths if path.is_file()]
        if len(files) > 1 and not self._warned:
            self._warned = True
            log.warning(
                "%s has %s for one video, and %s is used. Remove the others; this warning appears once.",
                self.location, " and ".join(path.name for path in files), files[0].name,
                extra={"code": "ambiguous_features"},
            )  # fmt: skip
        if files:
            return files[0]
        check_directory(self.location, f"The directory of the features of {excerpt(video)},", MissingFeatures)
        for path in paths:
            if path.exists():
                check_file(path, "The feature file", FeatureError)
        raise MissingFeatures(
            f"Expected {paths[0]} (or {', '.join(SUFFIXES[1:])}) for the video {excerpt(video)}, got no file. Extract "
            "its features." + near_name(self._names, *_spellings(video))
        )

    @functools.cached_property
    def _names(self) -> dict[str, str]:
        """Names of the files without their suffixes for `near_name`, listed only if a video is missing."""
        paths = (Path(name) for name in os.listdir(self.location))
        return by_fold(path.stem for path in paths if path.suffix in SUFFIXES)

    def load(self, video: str) -> np.ndarray:
        return load_features(self.path(video))

    def num_clips(self, video: str) -> int:
        path = self.path(video)
        if path.suffix == ".npy":
            # `load_features` reports errors of the file.
            with contextlib.suppress(Exception), open(path, "rb") as stream:
                return read_header(stream).shape[0]
        return len(load_features(path))

    def stamp(self, video: str) -> tuple[Any, ...]:
        path = self.path(video)
        return path.name, *content_stamp(path)

    def file_stamp(self, video: str) -> tuple[Any, ...] | None:
        for name in _spellings(video):
            for suffix in SUFFIXES:
                stamp = file_stamp(os.path.join(self.location, name + suffix))
                if stamp is not None:
                    return name, suffix, *stamp
        return None

    def content(self, video: str) -> bytes:
        return self.path(video).read_bytes()


class FeatureArchive:
    """One HDF5 file with a (num_clips, D) dataset for each video, or a group that contains one.

    Links within the file are followed. Links out of it, virtual datasets and values in external files are rejected.
    """

    def __init__(self, file: Path) -> None:
        self.location = file
        self._reader = Hdf5Reader(file)

    def path(self, video: str) -> Path:
        self._reader.describe(_spellings(video))
        return self.location

    def load(self, video: str) -> np.ndarray:
        return self._reader.read(_spellings(video))

    def num_clips(self, video: str) -> int:
        return int(self._reader.describe(_spellings(video))["shape"][0])

    def stamp(self, video: str) -> tuple[Any, ...]:
        name = self._reader.describe(_spellings(video))["name"]
        return self.location.name, *content_stamp(self.location), name

    def file_stamp(self, video: str) -> tuple[Any, ...] | None:
        return file_stamp(self.location)

    def close(self) -> None:
        """End the process that reads the file; the next read starts another."""
        self._reader.close()

    def content(self, video: str) -> bytes:
        features = self.load(video)
        return f"{features.dtype} {features.shape} ".encode() + features.tobytes()


def open_store(root: Path, location: Path | None) -> FeatureStore:
    """Return the feature store of the data set in a directory.

    Args:
        location: directory or HDF5 file of the features; default: `features/` in `root`. If the directory does not
            exist, the HDF5 file in `root` is used.

    Raises:
        FeatureError: `root` has several HDF5 files, or an HDF5 file in addition to the directory.
    """
    if location is not None and location.suffix in HDF5_SUFFIXES:
        return FeatureArchive(location)
    directory = location or root / "features"
    archives = sorted(path for suffix in HDF5_SUFFIXES for path in root.glob(f"*{suffix}"))
    if len(archives) > 1 or (archives and directory.is_dir()):
        siblings = [path.name for path in archives] + ([f"{directory.name}/"] if directory.is_dir() else [])
        raise FeatureError(
            f"Expected one store of features in {root}, got {' and '.join(siblings)}. Remove the others.",
            code="ambiguous_features",
        )
    return FeatureArchive(archives[0]) if archives else FeatureFiles(directory)


def _spellings(video: str) -> list[str]:
    """Return the possible names of the features of a video: its name, with and without the suffix of a video file."""
    if not is_file_name(video):
        raise FeatureError(
            f"Expected the name of a video that can be a file name, got {excerpt(video)}. Correct the name.",
            code="invalid_video_name",
        )
    return list(dict.fromkeys((video, file_stem(video))))
