"""Read the clip features of a corpus: a data set, a directory of feature files, or Parquet."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, Union

import numpy as np

from runtime.core.errors import AnnotationError, DeviceError, FeatureError, GroundingError, excerpt, one_line, reading
from runtime.core.io.array_files import MAX_AXES, check_unfolded
from runtime.core.io.digests import content_stamp, json_digest
from runtime.core.io.input_files import read_json
from runtime.core.io.text_files import is_number
from runtime.core.video import ClipTiming, Origin, Video, check_frame_rate
from runtime.corpus.parquet_check import check_metadata
from runtime.corpus.parquet_pages import unfolded_bytes
from runtime.datasets.dataset import COUNTED_VIDEOS, DataSet, median_rate
from runtime.datasets.feature_stores import HDF5_SUFFIXES, FeatureArchive, FeatureFiles
from runtime.datasets.validation import check_distinct_names

DURATIONS = "durations.json"
PARQUET_SUFFIXES = (".parquet", ".pq")
# Rows of a Parquet file that are unfolded at a time: more are not faster.
ROWS_AT_ONCE = 1

# File, row group and row, of what lies in Parquet.
Place = Union[tuple[int, int, int], None]


@dataclasses.dataclass(frozen=True)
class VideoRef:
    """A video of a corpus.

    Attributes:
        name: as queries call it.
        place: where it lies; None where its name says so.
    """

    name: str
    place: Place = None


class FeatureSource(Protocol):
    """The features of many videos. Every process that grounds opens its own.

    Attributes:
        kind: what it is, for people.
    """

    kind: str

    def listing(self) -> list[VideoRef]:
        """Return every video, in the order in which they are best read."""

    def digest(self) -> str:
        """Return what changes when other videos, lengths or files are listed; the features themselves are not read."""

    def stamp(self, video: VideoRef) -> str:
        """Return what changes when the features of a video do, 16 hexadecimal digits; of samples, so that a million
        videos can be compared. Empty where there are no features."""

    def shared_file(self, video: VideoRef) -> Path | None:
        """Return the file that holds the features of this video and of others, whose stamp is that of all of them;
        None if a video has a file of its own."""

    def load(self, videos: Sequence[VideoRef], clock: ClipTiming) -> Iterator[Video | str]:
        """Yield each video when it is asked for, or a sentence that says why it cannot be had."""


def open_source(path: Path) -> FeatureSource:
    """Return the features in a data set, a directory of feature files with `durations.json`, or in Parquet.

    Raises:
        AnnotationError, FeatureError: it is none of these, or its tables are malformed.
    """
    if path.suffix in PARQUET_SUFFIXES and path.is_file():
        return ParquetSource([path])
    if not path.is_dir():
        wrong = "cannot be the features of a corpus" if path.exists() else "does not exist"
        raise FeatureError(
            f"{path} {wrong}; give a data set, a directory of feature files with {DURATIONS}, or Parquet.",
            code="unknown_feature_store" if path.exists() else "missing_file",
        )
    parquet = sorted(result for suffix in PARQUET_SUFFIXES for result in path.glob(f"*{suffix}"))
    archives = sorted(result for suffix in HDF5_SUFFIXES for result in path.glob(f"*{suffix}"))
    if (path / DURATIONS).is_file() and (parquet or archives):
        raise FeatureError(
            f"{path} holds features in {(parquet or archives)[0].name} and lengths of feature files in {DURATIONS}. "
            "Move one of them to a directory of its own.",
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
        # What else decides the times of moments, where it does.
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
        return store.place if isinstance(store, FeatureArchive) else None

    def load(self, videos: Sequence[VideoRef], clock: ClipTiming) -> Iterator[Video | str]:
        for video in videos:
            yield _load_or_error(functools.partial(self._data_set.video, video.name))


class DirectorySource:
    """`VIDEO.npy`, `.npz` or `.pt` files and `durations.json`, which maps each to seconds, or to `{"duration": seconds,
    "num_frames": N}`; frames that are not given are counted from the clips."""

    kind = "directory"

    def __init__(self, root: Path) -> None:
        self._store = FeatureFiles(root)
        table = read_json(root / DURATIONS, "lengths of the videos")
        if not isinstance(table, dict) or not table:
            raise AnnotationError(
                f'{root / DURATIONS} should map videos to seconds, {{"VIDEO": 30.96}}, and does not.',
                code="unexpected_structure",
            )
        check_distinct_names(table, str(root / DURATIONS))
        self._table, self._lengths = root / DURATIONS, table
        self._usual_rate: float | None = None
        self._origin = Origin(f"Correct num_frames in {DURATIONS}, or use features with this clip timing.")

    def listing(self) -> list[VideoRef]:
        return [VideoRef(name) for name in sorted(self._lengths)]

    def digest(self) -> str:
        return json_digest(self._lengths)

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
        return _length(self._lengths[name], f"{self._table}: {excerpt(name)}")

    def _rates(self, clock: ClipTiming) -> Iterator[float]:
        """Yield the frames per second of the videos that can be read."""
        for name in self._lengths:
            with contextlib.suppress(GroundingError, ZeroDivisionError):
                duration, num_frames = self._length(name)
                yield (num_frames or clock.num_frames(self._store.num_clips(name))) / duration


class ParquetSource:
    """Parquet files, a row for each video: `video`, `duration`, perhaps `num_frames`, and `features`.

    Features are a list of clips, each a list of D floats; or D floats after D floats in one list or in bytes (little
    endian), with a column `shape`, [num_clips, D], and for bytes perhaps `dtype` (float32 where it is not given); or a
    tensor as Ray Data writes it.
    """

    kind = "Parquet"

    def __init__(self, files: Sequence[Path]) -> None:
        try:
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise DeviceError(
                f"Parquet needs pyarrow, which cannot be imported ({error}); "
                "run `pip install '.[corpus]'` in the drn-deploy directory.",
                code="missing_library",
            ) from error
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
                        f"{path}: the column video holds values of type {kind}. Write the names of the videos as text.",
                        code="invalid_video_name",
                    )
                for group in range(file.num_row_groups):
                    self._check_group(file, number, group, ("video",))
                    for row, name in enumerate(self._names(number, group)):
                        if not isinstance(name, str) or not name:
                            raise AnnotationError(
                                f"{path}: a video is called {excerpt(name)}; every row names its video.",
                                code="invalid_video_name",
                            )
                        if name in seen:
                            raise AnnotationError(
                                f"{path}: {excerpt(name)} is in two rows; remove one of them.",
                                code="ambiguous_video_name",
                            )
                        seen.add(name)
                        listed.append(VideoRef(name, (number, group, row)))
        if not listed:
            raise AnnotationError(f"{self._files[0]} holds no row.", code="empty_file")
        return listed

    def digest(self) -> str:
        listed: list[Any] = []
        for number, path in enumerate(self._files):
            with self._opened(number) as file:
                listed.append([path.name, path.stat().st_size, file.metadata.num_rows])
        return json_digest([listed, [video.name for video in self.listing()]])

    def stamp(self, video: VideoRef) -> str:
        return _stamp(functools.partial(content_stamp, self._files[_part(video.place)[0]]))

    def shared_file(self, video: VideoRef) -> Path | None:
        return self._files[_part(video.place)[0]]

    def load(self, videos: Sequence[VideoRef], clock: ClipTiming) -> Iterator[Video | str]:
        for (number, group), chosen in itertools.groupby(videos, key=lambda video: _part(video.place)):
            names = {_row(video.place): video.name for video in chosen}
            try:
                rows = self._rows(number, group, sorted(names))
                for row, values in rows:
                    yield _load_or_error(functools.partial(_unfolded, values, names.pop(row), clock, self._origin))
            # A page holds many rows, and a damaged one leaves none of them.
            except FeatureError as error:
                yield from (f"{excerpt(name)} cannot be read: {error}" for _, name in sorted(names.items()))

    def _rows(self, number: int, group: int, rows: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the values of rows of a row group by column, in order; FeatureError where the file is damaged."""
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
        """Raise FeatureError unless what these columns of a row group unfold to is in proportion to their size."""
        path = self._files[number]
        with self._reading(number), open(path, "rb") as stream:
            about = file.metadata.row_group(group)
            for index in range(about.num_columns if about.num_rows else 0):
                column = about.column(index)
                if column.path_in_schema.split(".")[0] in columns:
                    unfolded = unfolded_bytes(stream, column)
                    check_unfolded(f"{path}: {column.path_in_schema}", unfolded, column.total_compressed_size)

    @contextlib.contextmanager
    def _opened(self, number: int) -> Iterator[Any]:
        with self._reading(number):
            file = self._file(number)
        with file:
            missing = [name for name in NEEDED if name not in file.schema_arrow.names]
            if missing:
                raise AnnotationError(
                    f"{self._files[number]} lacks the column {excerpt(missing[0])}; video, duration and features are "
                    "expected, and perhaps num_frames, shape and dtype.",
                    code="missing_columns",
                )
            yield file

    def _file(self, number: int, **options: Any) -> Any:
        return self._parquet.ParquetFile(
            self._files[number], memory_map=True, pre_buffer=False, page_checksum_verification=True, **options
        )

    def _names(self, number: int, group: int) -> Iterator[Any]:
        """Yield the names in a row group, which stay indices until then: a dictionary repeats long ones for nothing."""
        with self._reading(number), self._file(number, read_dictionary=["video"]) as file:
            names = file.read_row_group(group, columns=["video"]).column("video")
            yield from (name.as_py() for name in names)


NEEDED = ("video", "duration", "features")
COLUMNS = ("duration", "num_frames", "features", "shape", "dtype")


def _stamp(stamp: Callable[[], tuple[Any, ...]]) -> str:
    try:
        return json_digest(stamp())[:16]
    except DeviceError:
        raise
    except (GroundingError, OSError):
        return ""


def _part(location: Place) -> tuple[int, int]:
    assert location is not None
    return location[0], location[1]


def _row(location: Place) -> int:
    assert location is not None
    return location[2]


def _unfolded(values: dict[str, Any], name: str, clock: ClipTiming, origin: Origin) -> Video:
    row = f"The row of {excerpt(name)}"
    with reading(row, "a video with its features", FeatureError, "write the row again"):
        length, frames = _length({key: _plain(values, key) for key in ("duration", "num_frames")}, row)
        features = _features(values, name)
    return Video(features, clock.num_frames(len(features)) if frames is None else frames, length, name, origin)


def _features(values: dict[str, Any], name: str) -> np.ndarray:
    """Return the (num_clips, D) features of a row; FeatureError if there are none."""
    import pyarrow as pa

    cell = values["features"]
    if not cell.is_valid:
        raise FeatureError(f"The row of {excerpt(name)} has no features.")
    shape, dtype = _plain(values, "shape"), _plain(values, "dtype")
    # Tensors are known by their extension where it is loaded, and by what they are stored as elsewhere.
    if isinstance(cell.type, pa.BaseExtensionType):
        shape, cell = getattr(cell.type, "shape", shape), cell.value
    if pa.types.is_struct(cell.type) and {"data", "shape"} <= {field.name for field in cell.type}:
        cell, shape = cell["data"], _plain(cell, "shape")
    try:
        numbers, clips = _numbers(cell, dtype)
        return numbers.reshape(clips, -1) if shape is None and clips else numbers.reshape(_two(shape))
    except (TypeError, ValueError) as error:
        raise FeatureError(
            f"The features of {excerpt(name)} are no (num_clips, D) floats: {one_line(error)}.", code="wrong_array"
        ) from error


def _plain(values: Any, key: str) -> Any:
    """Return the number, text or short list under a name; None where there is none."""
    try:
        cell = values[key]
    except KeyError:
        return None
    items = _items(cell)
    if items is not None and len(items) > MAX_AXES:
        raise ValueError(f"{key} holds {len(items)} values")
    return cell.as_py()


def _items(cell: Any) -> Any:
    """Return the array in a list scalar; None for other scalars. `values` of a struct is a method."""
    items = getattr(cell, "values", None)
    return None if callable(items) else items


def _two(shape: Any) -> tuple[int, int]:
    if not (isinstance(shape, (list, tuple)) and len(shape) == 2 and all(isinstance(n, int) and n > 0 for n in shape)):
        raise ValueError(f"a column `shape` should hold [num_clips, D], and holds {shape}")
    return shape[0], shape[1]


def _numbers(cell: Any, dtype: str | None) -> tuple[np.ndarray, int]:
    """Return all numbers of a cell, and how many clips they are, 0 where the cell does not say."""
    import pyarrow as pa

    if pa.types.is_binary(cell.type) or pa.types.is_large_binary(cell.type):
        kind = dtype or "float32"
        if kind not in ("float16", "float32", "float64"):
            raise ValueError(f"bytes are of float16, float32 or float64, and {excerpt(kind)} was given")
        return np.frombuffer(cell.as_buffer(), np.dtype(kind).newbyteorder("<")), 0
    inner, clips = _items(cell), 0
    if inner is not None and hasattr(inner.type, "value_type"):
        lengths = inner.value_lengths().unique()
        if len(lengths) != 1 or lengths.null_count:
            raise ValueError(f"all clips should have as many features, and have {lengths[:5].to_pylist()}")
        inner, clips = inner.flatten(), len(inner)
    if inner is None or not pa.types.is_floating(inner.type):
        raise ValueError(f"they are {cell.type}")
    return inner.to_numpy(zero_copy_only=False), clips


def _length(value: Any, location: str) -> tuple[float, int | None]:
    """Return a duration in seconds and a frame count, None where it is not given; checked by `Video`."""
    row: Any = value if isinstance(value, dict) else {"duration": value}
    duration, num_frames = row.get("duration"), row.get("num_frames")
    if not is_number(duration) or not (num_frames is None or (is_number(num_frames) and num_frames == int(num_frames))):
        raise AnnotationError(
            f"{location} should have seconds and perhaps frames, and has {excerpt(duration)} and {excerpt(num_frames)}."
        )
    return float(duration), None if num_frames is None else int(num_frames)


def _load_or_error(load: functools.partial[Video]) -> Video | str:
    """Return a video, or why it cannot be had. What the machine lacks is no fault of the video's."""
    try:
        return load()
    except DeviceError:
        raise
    except (GroundingError, OSError) as error:
        return " ".join(str(error).split())
