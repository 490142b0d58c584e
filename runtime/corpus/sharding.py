"""Assign pairs to shards, and describe the inputs of a corpus, before it is grounded."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from runtime.artifacts.engine_metadata import metadata_path, read_sidecar
from runtime.artifacts.onnx_metadata import external_data, raw_manifest
from runtime.backends.base import Device
from runtime.core.differences import differences
from runtime.core.errors import ModelFileError, OutputError, excerpt
from runtime.core.io.atomic_files import LOCK, content_names
from runtime.core.io.digests import sha256
from runtime.core.io.input_files import read_json
from runtime.core.io.text_files import check_format
from runtime.core.packages import installed_version
from runtime.corpus.feature_sources import FeatureSource, VideoRef
from runtime.corpus.queries import Question

FORMAT = "drn-corpus/1"
MANIFEST = "corpus.json"
# Distributions that run the network, by the suffix of a model file.
LIBRARIES = {
    ".onnx": ("onnxruntime", "onnxruntime-gpu"),
    ".pt": ("torch",),
    ".engine": ("tensorrt", "tensorrt_rtx", "tensorrt_lean"),
}
Form = Literal["jsonl", "parquet"]


@dataclasses.dataclass(frozen=True)
class VideoQueries:
    """A video with queries of one shard.

    Attributes:
        known: whether the source of features has the video.
        own: queries about this video only.
        start, end: range of the video's queries, own and common, in the order of their lines. It contains all
            of them unless the video is split over shards.
    """

    video: VideoRef
    known: bool
    own: tuple[Question, ...]
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start

    def questions(self, common: Sequence[Question]) -> list[Question]:
        """Return the queries in the range, given the queries that are common to all videos."""
        if not self.own:
            return list(common[self.start : self.end])
        merged = sorted((*common, *self.own), key=lambda question: question.line) if self.known else self.own
        return list(merged[self.start : self.end])


@dataclasses.dataclass(frozen=True)
class Shard:
    """A part of the corpus that is written to one file; `number` counts from 1."""

    number: int
    videos: tuple[VideoQueries, ...]

    def __len__(self) -> int:
        return sum(map(len, self.videos))


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything besides model, queries and features that determines the rows of a corpus.

    Attributes:
        window, overlap: window length and overlap in seconds; None uses the values of the model.
        device, threads: device and CPU threads of each process.
    """

    form: Form = "jsonl"
    shard_pairs: int = 5000
    top_k: int = 5
    batch_size: int = 32
    window: float | None = None
    overlap: float | None = None
    device: Device = "cpu"
    threads: int = 1


def plan(
    listing: Sequence[VideoRef], questions: Iterable[Question], shard_pairs: int
) -> tuple[list[Question], list[Shard]]:
    """Return the queries that are common to all videos, and the shards.

    Shards contain the videos in the order of the listing, and then the videos of queries that are not listed. A video
    is split over shards only if it has more pairs than a shard. The same inputs always give the same shards.

    Args:
        questions: queries in the order of their lines.
    """
    common: list[Question] = []
    own: dict[str, list[Question]] = {}
    for question in questions:
        if question.video is None:
            common.append(question)
        else:
            own.setdefault(question.video, []).append(question)
    shards: list[Shard] = []
    waiting: list[VideoQueries] = []
    room = shard_pairs
    for requested in _video_queries(listing, common, own, shard_pairs):
        if len(requested) > room:
            shards.append(Shard(len(shards) + 1, tuple(waiting)))
            waiting, room = [], shard_pairs
        waiting.append(requested)
        room -= len(requested)
    if waiting:
        shards.append(Shard(len(shards) + 1, tuple(waiting)))
    return common, shards


def _video_queries(
    listing: Sequence[VideoRef], common: Sequence[Question], own: dict[str, list[Question]], max_pairs: int
) -> Iterator[VideoQueries]:
    """Yield each video that has queries, in parts of at most `max_pairs`."""
    unknown = (VideoRef(name) for name in own.keys() - {video.name for video in listing})
    unlisted = sorted(unknown, key=lambda video: own[video.name][0].line)
    for index, video in enumerate((*listing, *unlisted)):
        own_queries = tuple(own.get(video.name, ()))
        known = index < len(listing)
        count = len(own_queries) + (len(common) if known else 0)
        for start in range(0, count, max_pairs):
            yield VideoQueries(video, known, own_queries, start, min(start + max_pairs, count))


def shard_name(number: int, count: int, form: Form) -> str:
    """Return the file name of a shard, such as shard-00002-of-00010.jsonl.

    Args:
        number: index of the shard, from 0.
        count: number of shards.
    """
    return f"shard-{number:05d}-of-{count:05d}.{form}"


def describe(model: Path, queries: Path, count: int, source: FeatureSource, settings: Settings) -> dict[str, Any]:
    """Return the inputs of a corpus for `corpus.json`: everything that could change a row."""
    return {
        "format": FORMAT,
        "model": {"file": model.name, "sha256": [sha256(path) for path in _files(model)]},
        "queries": {"file": queries.name, "sha256": sha256(queries), "rows": count},
        "features": {"kind": source.kind, "digest": source.digest()},
        "settings": dataclasses.asdict(settings),
        "versions": _versions(model, settings.form),
    }


def _files(model: Path) -> list[Path]:
    """Return all files of a model that determine its answers and whose SHA-256 no other of them records.

    The query part of a graph records its other parts, but that of an engine records only the graph of its video part.
    """
    files = [model]
    if model.suffix == ".onnx":
        # Invalid graphs are reported when they are opened.
        with contextlib.suppress(ModelFileError):
            files += external_data(model)
    if model.suffix == ".engine":
        files.append(metadata_path(model))
        sidecar = read_sidecar(model)
        if sidecar.manifest.part == "query":
            from runtime.backends.tensorrt_backend import locate_video_part

            video, _ = locate_video_part(model, sidecar)
            files += [video, metadata_path(video)]
    return files


def require_corpus_dir(output: Path) -> None:
    """Raise OutputError if `output` exists and is neither empty nor a corpus, before a lock file is written to it."""
    if not output.exists() or (output / LOCK).exists():
        return
    if not output.is_dir():
        raise OutputError(
            f"{output} is not a directory. Name a new or empty directory with --output.", code="output_is_file"
        )
    if content_names(output) and not (output / MANIFEST).exists():
        raise _not_a_corpus(output)


def check_same(output: Path, recorded: dict[str, Any]) -> None:
    """Raise OutputError if a directory, whose lock is held, contains shards of other inputs, or is not a corpus."""
    path = output / MANIFEST
    if not path.exists():
        if content_names(output):
            raise _not_a_corpus(output)
        return
    manifest = read_json(path, "a manifest of a corpus", OutputError)
    check_format(manifest, FORMAT, f"{path}", OutputError, "name another directory")
    if not any(output.glob("shard-*")):
        return
    # JSON turns tuples into lists.
    changes = [
        f"{' '.join(map(str, key))} was {excerpt(before)} and is {excerpt(now)}"
        for key, before, now in differences(manifest, json.loads(json.dumps(recorded)))
        if key[0] in recorded
    ]
    if changes:
        raise OutputError(
            f"{output} contains shards of other inputs ({'; '.join(changes)}). Use the same inputs, or name another "
            "directory with --output; ground additional videos from a separate source of features.",
            code="settings_mismatch",
        )


def _not_a_corpus(output: Path) -> OutputError:
    return OutputError(
        f"{output} is not empty and has no {MANIFEST}. Name a new or empty directory.", code="output_not_empty"
    )


def _versions(model: Path, form: Form) -> dict[str, str]:
    """Return the versions of the packages that the values or the encoding of a row depend on."""
    for_openvino = model.suffix == ".onnx" and raw_manifest(model).get("library") == "openvino"
    libraries = ("openvino",) if for_openvino else LIBRARIES.get(model.suffix, ())
    names = ["drn-deploy", "numpy", *libraries, *(["pyarrow"] if form == "parquet" else [])]
    versions = {name: installed_version(name) for name in names}
    return {name: version for name, version in versions.items() if version is not None}
