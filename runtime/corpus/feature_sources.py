"""Read the clip features of a corpus from a data set, a directory of feature files, or Parquet files."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from runtime.core.errors import (
    AnnotationError,
    DeviceError,
    FeatureError,
    GroundingError,
    excerpt,
    importing,
    one_line,
    reading,
)
from runtime.core.io.array_files import MAX_AXES, check_unfolded
from runtime.core.io.digests import content_stamp, json_digest
from runtime.core.io.input_files import read_json
from runtime.core.io.text_files import is_number
from runtime.core.pooling import ClipTiming
from runtime.core.video import Origin, Video, check_frame_rate
from runtime.corpus.parquet_check import check_metadata
from runtime.corpus.parquet_pages import decompressed_bytes
from runtime.datasets.dataset import COUNTED_VIDEOS, DataSet, median_rate
from runtime.datasets.feature_stores import HDF5_SUFFIXES, FeatureArchive, FeatureFiles
from runtime.datasets.validation import check_distinct_names

DURATIONS = "durations.json"
PARQUET_SUFFIXES = (".parquet", ".pq")
# Rows of a Parquet file that are decoded at a time; larger batches are not faster.
ROWS_AT_ONCE = 1

# Columns of a Parquet file.
REQUIRED_COLUMNS = ("video", "duration", "features")
COLUMNS = ("duration", "num_frames", "features", "shape", "dtype")

# File, row group and row of a video in Parquet files.
Location = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class VideoRef:
    """A video of a corpus.

    Attributes:
        location: location in Parquet files; None in other sources.
    """

    name: str
    location: Location | None = None


class FeatureSource(Protocol):
    """The features of many videos. Every worker process opens its own source.

    Attributes:
        kind: name of the kind of source, for the manifest.
    """

    kind: str

    def listing(self) -> list[VideoRef]:
        """Return every video, in the fastest order to read them."""

    def digest(self) -> str:
        """Return a digest of the listed videos, their durations and files, but not of the features."""

    def stamp(self, video: VideoRef) -> str:
        """Return 16 hexadecimal digits that change with the features of a video; empty if there are no features.

        Stamps are computed from samples of the files, so that the stamps of a million videos can be compared.
        """

    def shared_file(self, video: VideoRef) -> Path | None:
        """Return the file that contains the features of several videos, this one among them.

        All of its videos have one stamp. None if every video has a file of its own.
        """

    def load(self, videos: Sequence[VideoRef], clock: ClipTiming) -> Iterator[Video | str]:
        """Yield each video, or the reason why it cannot be loaded; videos are read when they are consumed.

        Args:
            clock: clip timing by which missing frame counts are estimated.
        """


def open_source(path: Path) -> FeatureSource:
    """Open the features of a corpus: a data set, a directory of feature files with `durations.json`, or Parquet.

    Raises:
        AnnotationError, FeatureError: the path is none of these, or its tables are malformed.
    """
    if path.suffix in PARQUET_SUFFIXES and path.is_file():
        return ParquetSource([path])
    if not path.is_dir():
        raise FeatureError(
            f"{path} {'is not a source of features' if path.exists() else 'does not exist'}. Give a data set, a "
            f"directory of feature files with {DURATIONS}, or Parquet files.",
            code="unknown_feature_store" if path.exists() else "missing_file",
        )
    parquet = sorted(file for suffix in PARQUET_SUFFIXES for file in path.glob(f"*{suffix}"))
    archives = sorted(file for suffix in HDF5_SUFFIXES for file in path.glob(f"*{suffix}"))
    if (path / DURATIONS).is_file() and (parquet or archives):
        raise FeatureError(
            f"Expected one source of features in {path}, got {(parquet or archives)[0].name} and {DURATIONS}, which "
            "belongs to feature files. Move one of the two to another directory.",
            code="ambiguous_features",
        )
    if parquet:
        return ParquetSource(parquet)
    if (path / DURATIONS).is_file():
        return DirectorySource(path)
    return DataSetSource(path)


class DataSetSource:
    """A data set in any layout that `DataSet` reads."""

    kind = "data set"

    def __init__(self, root: Path) -> None:
        self._data_set = DataSet(root)

    def listing(self) -> list[VideoRef]:
        return [VideoRef(name) for name in sorted(self._data_set.durations)]

    def digest(self) -> str:
        data = self._data_set
        parts: list[Any] = [data.durations, data.num_frames]
        # Clip timing is added only if times depend on it, so that digests of earlier versions stay valid.
        clock, spread = data.preset.features.clock, data.preset.spread
        if spread or data.durations.keys() - data.num_frames.keys():
            parts.append({"window": clock.window, "stride": clock.stride, "spread": spread})
        if offsets := data.offsets():
            parts.append({"offsets": offsets})
        return json_digest(parts)

    def stamp(self, video: VideoRef) -> str:
        return _stamp(functools.partial(self._data_set.store.stamp, video.name))

    def shared_file(self, video: VideoRef) -> Path | None:
        store = self._data_set.store
        return store.location if isinstance(store, FeatureArchive) else None

    def load(self, videos: Sequence[VideoRef], clock: ClipTiming) -> Iterator[Video | str]:
        for video in videos:
            yield _load_or_error(functools.partial(self._data_set.video, video.name))


class DirectorySource:
    """`VIDEO.npy`, `.npz` or `.pt` files with `durations.json`.

    The table maps each video to its duration in seconds, or to `{"duration": seconds, "num_frames": N}`. Missing frame
    counts are estimated from the number of clips.
    """

    kind = "directory"

    def __init__(self, root: Path) -> None:
        self._store = FeatureFiles(root)
        table = read_json(root / DURATIONS, "lengths of the videos")
        if not isinstance(table, dict) or not table:
            raise AnnotationError(
                f'{root / DURATIONS} is not a table of durations. Write seconds by video, {{"VIDEO": 30.96}}.',
                code="unexpected_structure",
            )
        check_distinct_names(table, str(root / DURATIONS))
        self._path, self._table = root / DURATIONS, table
        self._usual_rate: float | None = None
        self._origin = Origin(f"Correct num_frames in {DURATIONS}, or use features with this clip timing.")

    def listing(self) -> list[VideoRef]:
        return [VideoRef(name) for name in sorted(self._table)]

    def digest(self) -> str:
        return json_digest(self._table)

    def stamp(self, video: VideoRef) -> str:
        return _stamp(functools.partial(self._store.stamp, video.name))

    def shared_file(self, video: VideoRef) -> Path | None:
        return None

    def load(self, videos: Sequence[VideoRef], clock: ClipTiming) -> Iterator[Video | str]:
        for video in videos:
            yield _load_or_error(functools.partial(self._video, video.name, clock))

    def _video(self, name: str, clock: ClipTiming) -> Video:
        duration, num_frames = self._length(name)
        video = Video.load(self._store.path(name), duration, num_frames, name, clock, self._origin)
        if self._usual_rate is None:
            self._usual_rate = median_rate(itertools.islice(self._rates(clock), COUNTED_VIDEOS)) or 0.0
        check_frame_rate(name, video.num_frames, duration, usual_rate=self._usual_rate)
        return video

    def _length(self, name: str) -> tuple[float, int | None]:
        return _length(self._table[name], f"{self._path}: {excerpt(name)}")

    def _rates(self, clock: ClipTiming) -> Iterator[float]:
        """Yield the frame rates of the videos that can be read."""
        for name in self._table:
            with contextlib.suppress(GroundingError, ZeroDivisionError):
                duration, num_frames = self._length(name)
                yield (num_frames or clock.num_frames(self._store.num_clips(name))) / duration


class ParquetSource:
    """Parquet files with one row per video: `video`, `duration`, optionally `num_frames`, and `features`.

    Features are a list of clips, each a list of D floats; or all floats in one list or in little-endian bytes, with a
    column `shape`, [num_clips, D], and for bytes optionally `dtype` (default: float32); or a tensor as Ray Data writes
    it.
    """

    kind = "Parquet"

    def __init__(self, files: Sequence[Path]) -> None:
        with importing("pyarrow, which reads Parquet,", "corpus"):
            import pyarrow.parquet as parquet
        check_metadata(files)
        self._files = list(files)
        self._parquet = parquet
        self._origin = Origin("Correct the column num_frames, or use features with this clip timing.")

    def listing(self) -> list[VideoRef]:
        import pyarrow as pa

        listed, seen = [], set()
        for number, path in enumerate(self._files):
            with self._opened(number) as file:
                kind = file.schema_arrow.field("video").type
                if pa.types.is_nested(kind):
                    raise AnnotationError(
                        f"{path}: expected text in the column video, got {kind}. Write the names of the videos.",
                        code="invalid_video_name",
                    )
                for group in range(file.num_row_groups):
                    self._check_group(file, number, group, ("video",))
                    for row, name in enumerate(self._names(number, group)):
                        if not isinstance(name, str) or not name:
                            raise AnnotationError(
                                f"{path}: expected the name of a video in every row, got {excerpt(name)}. Add the "
                                "name.",
                                code="invalid_video_name",
                            )
                        if name in seen:
                            raise AnnotationError(
                                f"{path}: two rows have the video {excerpt(name)}. Remove one row.",
                                code="ambiguous_video_name",
                            )
                        seen.add(name)
                        listed.append(VideoRef(name, (number, group, row)))
        if not listed:
            raise AnnotationError(f"{self._files[0]} has no rows. Give a file with videos.", code="empty_file")
        return listed

    def digest(self) -> str:
        files: list[Any] = []
        for number, path in enumerate(self._files):
            with self._opened(number) as file:
                files.append([path.name, path.stat().st_size, file.metadata.num_rows])
        return json_digest([files, [video.name for video in self.listing()]])

    def stamp(self, video: VideoRef) -> str:
        return _stamp(functools.partial(content_stamp, self._files[_location(video)[0]]))

    def shared_file(self, video: VideoRef) -> Path | None:
        return self._files[_location(video)[0]]

    def load(self, videos: Sequence[VideoRef], clock: ClipTiming) -> Iterator[Video | str]:
        for (number, group), chosen in itertools.groupby(videos, key=lambda video: _location(video)[:2]):
            names = {_location(video)[2]: video.name for video in chosen}
            try:
                rows = self._rows(number, group, sorted(names))
                for row, values in rows:
                    yield _load_or_error(functools.partial(_video_of_row, values, names.pop(row), clock, self._origin))
            # A page contains many rows, so that damage affects all rows that follow.
            except FeatureError as error:
                yield from (f"{excerpt(name)} cannot be read: {error}" for _, name in sorted(names.items()))

    def _rows(self, number: int, group: int, rows: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the values of rows of a row group by column, in order; FeatureError if the file is damaged."""
        with self._opened(number) as file:
            columns = [name for name in COLUMNS if name in file.schema_arrow.names]
            self._check_group(file, number, group, columns)
            batches, start, left = iter(()), 0, list(rows)
            batch: Any = ()
            with self._reading(number):
                batches = file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=columns)
            while left:
                with self._reading(number):
                    if left[0] >= start + len(batch):
                        start, batch = start + len(batch), next(batches)
                        continue
                    values = {name: batch.column(name)[left[0] - start] for name in columns}
                yield left.pop(0), values

    def _reading(self, number: int) -> contextlib.AbstractContextManager[None]:
        return reading(self._files[number], "a Parquet file", FeatureError, "copy it or write it again")

    def _check_group(self, file: Any, number: int, group: int, columns: Sequence[str]) -> None:
        """Raise FeatureError if columns of a row group decompress to far more bytes than they take in the file."""
        path = self._files[number]
        with self._reading(number), open(path, "rb") as stream:
            metadata = file.metadata.row_group(group)
            for index in range(metadata.num_columns if metadata.num_rows else 0):
                column = metadata.column(index)
                if column.path_in_schema.split(".")[0] in columns:
                    size = decompressed_bytes(stream, column)
                    check_unfolded(f"{path}: {column.path_in_schema}", size, column.total_compressed_size)

    @contextlib.contextmanager
    def _opened(self, number: int) -> Iterator[Any]:
        with self._reading(number):
            file = self._file(number)
        with file:
            missing = [name for name in REQUIRED_COLUMNS if name not in file.schema_arrow.names]
            if missing:
                raise AnnotationError(
                    f"{self._files[number]} lacks the column {excerpt(missing[0])}. Write the columns video, duration "
                    "and features, and optionally num_frames, shape and dtype.",
                    code="missing_columns",
                )
            yield file

    def _file(self, number: int, **options: Any) -> Any:
        return self._parquet.ParquetFile(
            self._files[number], memory_map=True, pre_buffer=False, page_checksum_verification=True, **options
        )

    def _names(self, number: int, group: int) -> Iterator[Any]:
        """Yield the names in a row group. As a dictionary column, repeated names take memory only once."""
        with self._reading(number), self._file(number, read_dictionary=["video"]) as file:
            names = file.read_row_group(group, columns=["video"]).column("video")
            yield from (name.as_py() for name in names)


def _stamp(stamp: Callable[[], tuple[Any, ...]]) -> str:
    """Return a digest of a stamp; empty if the features cannot be read."""
    try:
        return json_digest(stamp())[:16]
    except DeviceError:
        raise
    except (GroundingError, OSError):
        return ""


def _location(video: VideoRef) -> Location:
    assert video.location is not None
    return video.location


def _video_of_row(values: dict[str, Any], name: str, clock: ClipTiming, origin: Origin) -> Video:
    row = f"The row of {excerpt(name)}"
    with reading(row, "a video with its features", FeatureError, "write the row again"):
        duration, frames = _length({key: _plain(values, key) for key in ("duration", "num_frames")}, row)
        features = _features(values, name)
    return Video(features, clock.num_frames(len(features)) if frames is None else frames, duration, name, origin)


def _features(values: dict[str, Any], name: str) -> np.ndarray:
    """Return the (num_clips, D) features of a row; FeatureError if there are none."""
    import pyarrow as pa

    cell = values["features"]
    if not cell.is_valid:
        raise FeatureError(f"The row of {excerpt(name)} has no features. Write the row again.", code="missing_features")
    shape, dtype = _plain(values, "shape"), _plain(values, "dtype")
    # Without their extension, tensors have the type that they are stored as.
    if isinstance(cell.type, pa.BaseExtensionType):
        shape, cell = getattr(cell.type, "shape", shape), cell.value
    if pa.types.is_struct(cell.type) and {"data", "shape"} <= {field.name for field in cell.type}:
        cell, shape = cell["data"], _plain(cell, "shape")
    try:
        numbers, clips = _numbers(cell, dtype)
        if shape is None and clips:
            return numbers.reshape(clips, -1)
        is_pair = isinstance(shape, (list, tuple)) and len(shape) == 2
        if not is_pair or not all(isinstance(size, int) and size > 0 for size in shape):
            raise ValueError(f"expected [num_clips, D] in the column shape, got {shape}")
        return numbers.reshape(shape)
    except (TypeError, ValueError) as error:
        raise FeatureError(
            f"Expected (num_clips, D) floats as features of {excerpt(name)}: {one_line(error)}. Write the row again.",
            code="wrong_array",
        ) from error


def _plain(values: Any, key: str) -> Any:
    """Return the value of a column as a number, text, or list of at most `MAX_AXES` items; None without a value."""
    try:
        cell = values[key]
    except KeyError:
        return None
    items = _items(cell)
    if items is not None and len(items) > MAX_AXES:
        raise ValueError(f"expected at most {MAX_AXES} values in the column {key}, got {len(items)}")
    return cell.as_py()


def _items(cell: Any) -> Any:
    """Return the items of a list scalar as an array; None for other scalars, such as structs with a method `values`."""
    items = getattr(cell, "values", None)
    return None if callable(items) else items


def _numbers(cell: Any, dtype: str | None) -> tuple[np.ndarray, int]:
    """Return the numbers of a cell as a 1-D array, and its number of clips; 0 if it is not a list of lists."""
    import pyarrow as pa

    if pa.types.is_binary(cell.type) or pa.types.is_large_binary(cell.type):
        kind = dtype or "float32"
        if kind not in ("float16", "float32", "float64"):
            raise ValueError(f"expected a dtype of float16, float32 or float64, got {excerpt(kind)}")
        return np.frombuffer(cell.as_buffer(), np.dtype(kind).newbyteorder("<")), 0
    inner, clips = _items(cell), 0
    if inner is not None and hasattr(inner.type, "value_type"):
        widths = inner.value_lengths().unique()
        if len(widths) != 1 or widths.null_count:
            raise ValueError(f"expected clips of one feature width, got {widths[:5].to_pylist()}")
        inner, clips = inner.flatten(), len(inner)
    if inner is None or not pa.types.is_floating(inner.type):
        raise ValueError(f"expected numbers, lists of numbers or bytes, got {cell.type}")
    return inner.to_numpy(zero_copy_only=False), clips


def _length(value: Any, source: str) -> tuple[float, int | None]:
    """Return a duration in seconds, and a frame count or None; `Video` checks their range."""
    row: Any = value if isinstance(value, dict) else {"duration": value}
    duration, num_frames = row.get("duration"), row.get("num_frames")
    if not is_number(duration) or not (num_frames is None or (is_number(num_frames) and num_frames == int(num_frames))):
        raise AnnotationError(
            f"{source}: expected a duration in seconds and optionally a frame count, got {excerpt(duration)} and "
            f"{excerpt(num_frames)}. Correct the row.",
            code="malformed_row",
        )
    return float(duration), None if num_frames is None else int(num_frames)


def _load_or_error(load: functools.partial[Video]) -> Video | str:
    """Return a video, or the reason why it cannot be loaded. Errors of the machine are raised."""
    try:
        return load()
    except DeviceError:
        raise
    except (GroundingError, OSError) as error:
        return " ".join(str(error).split())
