"""Assign pairs to shards and describe the inputs of a corpus, before anything is grounded."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from runtime.artifacts.engine_metadata import metadata_path, read_sidecar
from runtime.artifacts.onnx_metadata import external_data
from runtime.backends.base import Device
from runtime.core.differences import differences
from runtime.core.errors import ModelFileError, OutputError, excerpt
from runtime.core.io.atomic_files import LOCK, content_names
from runtime.core.io.digests import sha256
from runtime.core.io.input_files import read_json
from runtime.core.io.text_files import check_format
from runtime.corpus.feature_sources import FeatureSource, VideoRef
from runtime.corpus.queries import Question

FORMAT = "drn-corpus/1"
MANIFEST = "corpus.json"
# What runs the network, by the suffix of a model file.
LIBRARIES = {
    ".onnx": ("onnxruntime", "onnxruntime-gpu"),
    ".pt": ("torch",),
    ".engine": ("tensorrt", "tensorrt_rtx", "tensorrt_lean"),
}
Form = Literal["jsonl", "parquet"]


@dataclasses.dataclass(frozen=True)
class VideoQueries:
    """A video and some of what it is asked.

    Attributes:
        video: where its features are.
        known: whether the corpus has such a video at all.
        own: the questions that are about it alone.
        first, last: of its questions, its own and those of every video in the order of their lines: from the one, up to
            the other, last excluded. All of them, but for a video that is split over shards.
    """

    video: VideoRef
    known: bool
    own: tuple[Question, ...]
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first

    def questions(self, common: Sequence[Question]) -> list[Question]:
        """Return what is asked here, given what is asked of every video."""
        if not self.own:
            return list(common[self.first : self.last])
        merged = sorted((*common, *self.own), key=lambda question: question.line) if self.known else self.own
        return list(merged[self.first : self.last])


@dataclasses.dataclass(frozen=True)
class Shard:
    """A part of the corpus that becomes one file; `number` counts from 1."""

    number: int
    asked: tuple[VideoQueries, ...]

    def __len__(self) -> int:
        return sum(map(len, self.asked))


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that decides what the rows of a corpus are, besides its model, queries and features.

    Attributes:
        form: of the shards.
        shard_pairs: most pairs of a shard.
        top_k: most moments of a pair.
        batch_size: most pairs that go through the network at a time.
        window, overlap: how long videos are cut, in seconds; the model's own when None.
        device, threads: of each process.
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
    """Return what is asked of every video, and the shards.

    Videos come in the order of the listing, and after them those that are asked about and not listed. A video is split
    over shards only if it has more pairs than one holds. The same corpus always has the same shards.
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
    listing: Sequence[VideoRef], common: Sequence[Question], own: dict[str, list[Question]], most: int
) -> Iterator[VideoQueries]:
    """Yield each video that is asked anything, in parts of at most so many pairs."""
    unknown = (VideoRef(name) for name in own.keys() - {video.name for video in listing})
    unlisted = sorted(unknown, key=lambda video: own[video.name][0].line)
    for number, video in enumerate((*listing, *unlisted)):
        mine = tuple(own.get(video.name, ()))
        known = number < len(listing)
        count = len(mine) + (len(common) if known else 0)
        for first in range(0, count, most):
            yield VideoQueries(video, known, mine, first, min(first + most, count))


def shard_name(number: int, count: int, form: Form) -> str:
    """Return how the file of a shard is called."""
    return f"shard-{number:05d}-of-{count:05d}.{form}"


def describe(model: Path, queries: Path, count: int, source: FeatureSource, settings: Settings) -> dict[str, Any]:
    """Return what a corpus is made of, as `corpus.json` keeps it: whatever could change a row of it.

    Args:
        model: its file.
        queries, count: the file, and how many rows it has.
        source: of the features.
        settings: all else.
    """
    return {
        "format": FORMAT,
        "model": {"file": model.name, "sha256": [sha256(path) for path in _files(model)]},
        "queries": {"file": queries.name, "sha256": sha256(queries), "rows": count},
        "features": {"kind": source.kind, "digest": source.digest()},
        "settings": dataclasses.asdict(settings),
        "versions": _versions(model, settings.form),
    }


def _files(model: Path) -> list[Path]:
    """Return all files of a model that decide its answers and that no other of them names by SHA-256.

    The query part of a graph names its other parts; that of an engine names the graph that its video part was built of.
    """
    files = [model]
    if model.suffix == ".onnx":
        # What is no graph is refused where it is opened.
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
    """Raise OutputError if something else than a corpus lies there: nothing is put beside it, not even a lock."""
    if not output.exists() or (output / LOCK).exists():
        return
    if not output.is_dir():
        raise OutputError(
            f"{output} is not a directory; name a new or empty directory with --output.", code="output_is_file"
        )
    if content_names(output) and not (output / MANIFEST).exists():
        raise _not_a_corpus(output)


def check_same(output: Path, recorded: dict[str, Any]) -> None:
    """Raise OutputError if a directory holds shards of other inputs, or something else; for who holds its lock."""
    path = output / MANIFEST
    if not path.exists():
        if content_names(output):
            raise _not_a_corpus(output)
        return
    result = read_json(path, "what a corpus was made of", OutputError)
    check_format(result, FORMAT, f"{path}", OutputError, "name another directory")
    if not any(output.glob("shard-*")):
        return
    # As it is read from a file: tuples are lists there.
    changes = [
        f"{' '.join(map(str, key))} was {excerpt(before)} and is {excerpt(now)}"
        for key, before, now in differences(result, json.loads(json.dumps(recorded)))
        if key[0] in recorded
    ]
    if changes:
        raise OutputError(
            f"{output} was begun with other inputs, whose rows would not go with these ({'; '.join(changes)}). "
            "Take those again, or name another directory. Ground added videos from features of their own.",
            code="settings_mismatch",
        )


def _not_a_corpus(output: Path) -> OutputError:
    return OutputError(
        f"{output} is there and holds no {MANIFEST}; name a new or empty directory.", code="output_not_empty"
    )


def _versions(model: Path, form: Form) -> dict[str, str]:
    """Return the packages whose arithmetic or writing a row depends on."""
    names = ["drn-deploy", "numpy", *LIBRARIES.get(model.suffix, ()), *(["pyarrow"] if form == "parquet" else [])]
    results = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            results[name] = importlib.metadata.version(name)
    return results
