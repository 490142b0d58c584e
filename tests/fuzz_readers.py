"""Name every way in for files, each with a small whole input, for `tests.fuzzing`."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import dataclasses
import functools
import gzip
import importlib.util
import json
import multiprocessing
import types
import zipfile
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from runtime.artifacts.encoded_video import EncodedVideo, EncodedWindows
from runtime.artifacts.engine_layers import FORMAT as LAYERS_FORMAT
from runtime.artifacts.engine_layers import layer_stats_of_file, read_layers_file
from runtime.artifacts.engine_metadata import FORMAT as SIDECAR_FORMAT
from runtime.artifacts.engine_metadata import metadata_path, read_sidecar, with_digest
from runtime.artifacts.extractor_manifest import ExtractorManifest
from runtime.artifacts.manifest import METADATA_KEY, Features, Manifest
from runtime.artifacts.onnx_metadata import read_metadata
from runtime.backends import triton_protocol
from runtime.backends.triton_backend import FrontConfig
from runtime.benchmarking.report import read_report
from runtime.core.batch import Heads
from runtime.core.decoding import Decoding
from runtime.core.errors import FeatureError, GroundingError, ModelFileError
from runtime.core.io.digests import sha256
from runtime.core.io.input_files import read_json
from runtime.core.pooling import ClipTiming
from runtime.core.presence import Presence
from runtime.core.sliding_windows import Window, Windows
from runtime.core.tokenizer import Vocabulary
from runtime.core.video import load_features
from runtime.corpus.feature_sources import DirectorySource, ParquetSource
from runtime.corpus.queries import read_questions
from runtime.corpus.sharding import FORMAT as CORPUS_FORMAT
from runtime.corpus.sharding import MANIFEST, check_same
from runtime.datasets.dataset import DataSet
from runtime.datasets.prediction_files import read_predictions, read_truths
from runtime.datasets.presets import PRESETS
from runtime.datasets.qvhighlights import FORMAT as DATASET_FORMAT
from runtime.grounding.grounder import Grounder
from runtime.grounding.prediction_scores import score_predictions
from runtime.media.extraction import FORMAT as NOTE_FORMAT
from runtime.media.extraction import ExtractionRecord, read_record
from runtime.triton import front
from tests.array_bytes import npy
from tests.fuzzing import Reader

CLIPS = np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32)
WORDS = ("cat", "dog", "door", "runs", "opens", "person")
TABLE = {word: number for number, word in enumerate(WORDS, 1)}


QUERIES = [{"query": "person opens the door"}, {"query": "dog runs", "vid": "v_a", "qid": 7}]
CORPUS = {"format": CORPUS_FORMAT, "model": {"file": "drn.onnx", "sha256": ["0" * 64]}, "settings": {"top_k": 5}}
EXTRACTOR = ExtractorManifest("CLIP", 8, 16, 8, 224, (224, 224), (0.4, 0.4, 0.4), (0.2, 0.2, 0.2), 1.0)
NOTE = ExtractionRecord("0" * 64, "1" * 64, 12, 104, 24.0)
GLOVE = "".join(f"{word} {' '.join(map(str, range(8)))}\n" for word in WORDS)
LATENCY = {"samples": 20, **dict.fromkeys(("p50_ms", "p90_ms", "p95_ms", "max_ms", "mean_ms"), 1.0), "p99_ms": None}
CASE = {"group": "one query", "name": "network", "boundary": "host", "size": 1, "queries": 1}
REPORT = {
    "format": "drn-benchmark/1",
    "date": "2026-11-29",
    "command": "python -m runtime.benchmark",
    "hardware": {"cpu": "EPYC", "cores": 2, "gpu": None},
    "versions": {"numpy": "2"},
    "settings": {"samples": 20, "threads": 1, "device": "cpu"},
    "models": [{"label": "drn.onnx", "sha256": "0" * 64, "device": "cpu"}],
    "timings": [{"model": "drn.onnx", "latency": LATENCY, "case": CASE, "queries_per_s": 100.0}],
    "interrupted": False,
}


def available() -> list[Reader]:
    """Return the readers whose libraries are installed here."""
    groups = {
        _plain: (),
        _hdf5: ("h5py",),
        _parquet: ("pyarrow",),
        _torch: ("torch", "yaml"),
        _calib: ("onnx", "onnxruntime"),
        _service: ("fastapi", "python_multipart"),
    }
    return [
        reader
        for group, libraries in groups.items()
        if all(importlib.util.find_spec(library) for library in libraries)
        for reader in group()
    ]


def written(name: str, content: object) -> Callable[[Path], list[Path]]:
    """Return a function that writes one file: bytes, text, a list as JSON lines, or any other value as JSON."""
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    elif not isinstance(content, (str, bytes)):
        content = json.dumps(content)

    def make(directory: Path) -> list[Path]:
        (directory / name).write_bytes(content if isinstance(content, bytes) else str(content).encode())
        return [directory / name]

    return make


def reading(read: Callable[[Path], object]) -> Callable[[Path, Path], object]:
    """Return the `read` of a reader from a function of the damaged file."""
    return lambda directory, path: read(path)


def _plain() -> list[Reader]:
    return [
        *(
            Reader(f"features-{suffix}", functools.partial(_features, suffix=suffix), reading(_load))
            for suffix in ("npy", "npz", "npz-stored")
        ),
        Reader("charades-sta", _charades, _data_set),
        Reader("activitynet", functools.partial(_captions, tacos=False), _data_set),
        Reader("tacos", functools.partial(_captions, tacos=True), _data_set),
        Reader("common-form", _common_form, _data_set),
        Reader("queries", written("queries.jsonl", QUERIES), reading(read_questions)),
        Reader("predictions", _predictions, _score_predictions),
        Reader("corpus-directory", _corpus_directory, lambda directory, path: _all(DirectorySource(directory))),
        Reader(
            "corpus-manifest",
            written(MANIFEST, CORPUS),
            lambda directory, path: check_same(directory, {"format": CORPUS_FORMAT}),
        ),
        Reader("encoding", _encoding, reading(EncodedVideo.load), _zip_again),
        Reader("encoded-windows", _encoded_windows, reading(EncodedWindows.load), _zip_again),
        Reader("manifest", written("manifest.json", manifest().to_json()), reading(_read_manifest)),
        Reader("extractor-manifest", written("clip.onnx.json", EXTRACTOR.to_json()), reading(_read_extractor)),
        Reader("onnx-metadata", written("drn.onnx", _onnx()), reading(_read_onnx)),
        Reader("sidecar", _sidecar, lambda directory, path: read_sidecar(directory / "drn.engine"), _seal_sidecar),
        Reader("triton-about", written("about.json", FrontConfig(manifest(), "drn").to_json()), reading(_read_about)),
        Reader("benchmark-report", written("report.json", REPORT), reading(read_report)),
        Reader(
            "extraction-note",
            written("note.json", {"format": NOTE_FORMAT, **dataclasses.asdict(NOTE)}),
            reading(lambda path: read_record(read_json(path, "note on features"), path)),
        ),
        Reader("glove", written("glove.txt", GLOVE), reading(_read_glove)),
        Reader("engine-layers", written("layers.json", _layers()), _read_layers),
        Reader("triton-request", written("request.json", _triton_request()), reading(_read_triton_request)),
    ]


def _features(directory: Path, suffix: str) -> list[Path]:
    path = directory / f"v.{suffix.partition('-')[0]}"
    if suffix == "npy":
        np.save(path, CLIPS)
    else:
        (np.savez if suffix.endswith("stored") else np.savez_compressed)(path, features=CLIPS)
    return [path]


def _load(path: Path) -> object:
    return np.asarray(load_features(path))


def _with_features(directory: Path, name: str, *videos: str) -> None:
    (directory / name).mkdir()
    for video in videos:
        np.save(directory / name / f"{video}.npy", CLIPS)


def _charades(directory: Path) -> list[Path]:
    for split in ("train", "test"):
        (directory / f"Charades_sta_{split}.txt").write_text(
            "AAAAA 1.5 9.25##a person opens the door.\nBBBBB 0 4##the dog runs.\n"
        )
    tables = {
        "Charades_duration.json": {"AAAAA": 30.5, "BBBBB": 12},
        "Charades_frames_info.json": {"AAAAA": 104, "BBBBB": 108},
        "Charades_word2id.json": TABLE,
        "Charades_fps_dict.json": {"AAAAA": "24.0", "BBBBB": "24.0"},
    }
    for name, table in tables.items():
        (directory / name).write_text(json.dumps(table))
    _with_features(directory, "C3D_unit16_overlap0.5_merged", "AAAAA", "BBBBB")
    return sorted(path for path in directory.iterdir() if path.is_file())


def _captions(directory: Path, tacos: bool) -> list[Path]:
    clock = {"fps": 4.0, "num_frames": 104} if tacos else {"duration": 30.5}
    names = ("s1-d1.avi", "s2-d2.avi") if tacos else ("v_a", "v_b")
    entry = {**clock, "timestamps": [[1, 9], [10, 20]], "sentences": ["A person opens the door.", "The dog runs."]}
    for split, name in zip(("train", "test"), names, strict=True):
        (directory / f"{split}.json").write_text(json.dumps({name: entry}))
    _with_features(directory, "features", *(name.partition(".")[0] for name in names))
    return [directory / "train.json", directory / "test.json"]


def _common_form(directory: Path) -> list[Path]:
    for split in ("train", "test"):
        rows = [
            {"qid": 1, "query": "person opens the door", "vid": "v_a", "duration": 30, "relevant_windows": [[1, 9]]},
            {"qid": "x", "query": "dog runs", "vid": "v_b", "duration": 12.5, "relevant_windows": [[0, 2], [3, 9]]},
        ]
        (directory / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "vocabulary.json").write_text(json.dumps(TABLE))
    about = {"format": DATASET_FORMAT, "preset": PRESETS["tacos"].to_dict(), "num_frames": {"v_a": 104}}
    (directory / "dataset.json").write_text(json.dumps(about))
    _with_features(directory, "features", "v_a", "v_b")
    return sorted(path for path in directory.iterdir() if path.is_file())


def _data_set(directory: Path, path: Path) -> None:
    """Read all of a data set that commands read."""
    data_set = DataSet(directory)
    for split in data_set.splits:
        annotations = data_set.annotations(split, invalid="drop", quiet=True)
        data_set.truths(annotations)
        data_set.digest(split)
        for annotation in annotations:
            data_set.video(annotation.video).segments(
                data_set.preset.num_segments, clock=data_set.preset.features.clock
            )
            data_set.vocabulary.encode(annotation.sentence)


def _predictions(directory: Path) -> list[Path]:
    rows = {
        "predictions.jsonl": [
            {"qid": 1, "query": "dog runs", "vid": "a", "pred_relevant_windows": [[1, 9, 0.5], [2, 4, 0.25]]},
            {"qid": "x", "pred_relevant_windows": [[0, 20.5, 1]], "pred_saliency_scores": [0.5, -1]},
        ],
        "truths.jsonl": [
            {"qid": 1, "vid": "a", "relevant_windows": [[1, 9], [10, 40]]},
            {"qid": "x", "relevant_windows": [[0, 2.5]]},
        ],
    }
    for name, lines in rows.items():
        (directory / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [directory / name for name in rows]


def _score_predictions(directory: Path, path: Path) -> object:
    predictions, truths = read_predictions(directory / "predictions.jsonl"), read_truths(directory / "truths.jsonl")
    return score_predictions(predictions, truths).to_dict()


def _corpus_directory(directory: Path) -> list[Path]:
    (directory / "durations.json").write_text(json.dumps({"a": 30.5, "b": {"duration": 12, "num_frames": 104}}))
    np.save(directory / "a.npy", CLIPS)
    np.savez(directory / "b.npz", features=CLIPS)
    return [directory / "durations.json", directory / "a.npy"]


def _all(source: Any) -> list[Any]:
    """Read all videos of a corpus; what cannot be had is a sentence."""
    source.digest()
    loaded = list(source.load(source.listing(), ClipTiming()))
    assert all("\n" not in video for video in loaded if isinstance(video, str))
    return loaded


def _encoded() -> EncodedVideo:
    spans = np.stack((np.arange(4), np.arange(1, 5)), 1).astype(np.float32) / 4
    return EncodedVideo(CLIPS[:4].T.copy(), spans, 30.5, "v", "0" * 64)


def _encoding(directory: Path) -> list[Path]:
    _encoded().save(directory / "v.npz")
    return [directory / "v.npz"]


def _encoded_windows(directory: Path) -> list[Path]:
    windows = (Window(0, 3, 40, 0.0, 15.0), Window(4, 7, 40, 15.0, 15.0))
    parts = tuple(dataclasses.replace(_encoded(), duration=window.duration, key="") for window in windows)
    EncodedWindows(parts, windows, 30.0, "v").save(directory / "v.npz")
    return [directory / "v.npz"]


def _zip_again(path: Path) -> None:
    """Write the members of a damaged archive anew, so that their checksums hold."""
    members = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist()[:200]:
            with archive.open(member) as stream:
                # Of what a checksum would refuse, this gets the content all the same.
                stream._expected_crc = None  # type: ignore[attr-defined]
                members[member.filename] = stream.read(1 << 20)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


@functools.cache
def manifest() -> Manifest:
    return Manifest(
        Vocabulary(TABLE),
        Decoding(),
        Features("C3D", 8),
        sources={"drn.pt": "0" * 64},
        producer={"torch": "2"},
        training={"stage": 3, "query_length": [1, 8, 32]},
        windows=Windows(194.0, 43.0, 14.5),
        presence=Presence(0.2, 0.9, 0.8, 10, 10),
    )


def _read_manifest(path: Path) -> None:
    _use(Manifest.from_json(path.read_text("utf-8", "replace"), str(path)))


def _use(manifest: Manifest) -> None:
    """Do with a manifest what programs do, so that no value of a wrong kind is found out later."""
    manifest.to_json()
    _ = manifest.features.clock, manifest.decoding.num_locations, str(manifest.windows), str(manifest.presence)
    for sentence in ("person opens the door", "a cat"):
        manifest.vocabulary.encode(sentence)


def _read_extractor(path: Path) -> None:
    manifest = ExtractorManifest.from_dict(read_json(path, "description of an extractor", ModelFileError), str(path))
    manifest.to_json()
    manifest.framing.resized(240, 320)


def _varint(number: int) -> bytes:
    parts = bytearray()
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _onnx() -> bytes:
    """Return what a model file has around its graph: version, producer, graph, opsets, metadata."""
    entry = _field(1, METADATA_KEY.encode()) + _field(2, manifest().to_json().encode())
    return b"\x08\x0a" + _field(2, b"drn") + _field(7, b"\0" * 300) + _field(8, b"\x10\x12") + _field(14, entry)


def _read_onnx(path: Path) -> None:
    _use(Manifest.from_json(read_metadata(path).get(METADATA_KEY), str(path)))


def _sidecar(directory: Path) -> list[Path]:
    plan = directory / "drn.engine"
    plan.write_bytes(b"plan")
    content = {
        "format": SIDECAR_FORMAT,
        "manifest": manifest().to_dict(),
        "library": "tensorrt 11.4.0",
        "compute_capabilities": ["9.0"],
        "profiles": [{"name": "one query", "batch": [1, 1, 1], "query_length": [1, 8, 16], "shapes": {}}],
        "census": {"twin": {"shares": {"fp16": 0.97}}},
        "sha256": {plan.name: sha256(plan)},
    }
    metadata_path(plan).write_text(json.dumps(with_digest(content)))
    return [metadata_path(plan)]


def _seal_sidecar(path: Path) -> None:
    path.write_text(json.dumps(with_digest(json.loads(path.read_text()))))


def _read_about(path: Path) -> object:
    return FrontConfig.from_json(path.read_text("utf-8", "replace"), str(path))


class _Network:
    """A network that finds nothing."""

    manifest = property(lambda self: manifest())

    def run(self, batch: Any) -> Heads:
        count, locations = len(batch), self.manifest.decoding.num_locations
        return Heads(*(np.zeros((count, locations, *axes), np.float32) for axes in ((), (2,), ())))


def _layers() -> dict[str, Any]:
    tensor = {"Name": "x", "Dimensions": [1, 8], "Format/Datatype": "Row major linear FP16"}
    layer = {"Name": "conv", "LayerType": "Convolution", "Inputs": [tensor], "Outputs": [tensor], "Metadata": "[a]"}
    layers = {"Layers": [layer]}
    profile = {"name": "default", "shapes": {"x": [[1, 8]] * 3}, "bound": layers, "reason": None}
    about = {"format": LAYERS_FORMAT, "engine": "drn.engine", "sha256": "0" * 64, "library": "tensorrt 10"}
    return {**about, "unbound": layers, "profiles": [profile]}


def _read_layers(directory: Path, path: Path) -> object:
    packed_path = directory / "drn.engine.layers.json.gz"
    packed_path.write_bytes(gzip.compress(path.read_bytes(), 1))
    return layer_stats_of_file(read_layers_file(packed_path))


# Type and shape of each input, as the configuration of the front declares them; None is any size.
TRITON_INPUTS: dict[str, tuple[Any, tuple[int | None, ...]]] = {
    triton_protocol.QUERY: (object, (None, None)),
    triton_protocol.FEATURES: (np.float32, (None, None, None)),
    triton_protocol.DURATION: (np.float64, (None, 1)),
    triton_protocol.NUM_FRAMES: (np.int32, (None, 1)),
    triton_protocol.TOP_K: (np.int32, (None, 1)),
    triton_protocol.WINDOWS: (np.float64, (None, 3)),
    triton_protocol.ALWAYS_ANSWER: (np.bool_, (None, 1)),
}


def _triton_request() -> dict[str, Any]:
    row = [["person opens the door", "dog runs"], CLIPS.tolist(), [30.5], [104], [3], [194.0, 43.0, 14.5], [True]]
    return {name: [value] for name, value in zip(TRITON_INPUTS, row, strict=True)}


def _read_triton_request(path: Path) -> object:
    """Answer a request of these inputs if Triton would forward it: in one batch, with the declared types and shapes."""
    inputs = {}
    try:
        values = json.loads(path.read_text())
        for name, (kind, shape) in TRITON_INPUTS.items():
            array = inputs[name] = np.array(values[name], kind)
            if array.ndim != len(shape) or any(
                size not in (None, n) for size, n in zip(shape, array.shape, strict=True)
            ):
                return None
        texts = inputs[triton_protocol.QUERY]
        inputs[triton_protocol.QUERY] = np.array(
            [[text.encode("utf-8", "surrogatepass") for text in row] for row in texts], object
        )
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None
    if len({len(array) for array in inputs.values()}) != 1 or 0 in inputs[triton_protocol.QUERY].shape:
        return None
    model = object.__new__(front.Front)
    model.__dict__.update(
        _pb=types.SimpleNamespace(
            Tensor=lambda name, array: array,
            TritonError=_TritonError,
            InferenceResponse=lambda output_tensors=(), error=None: error or output_tensors,
            get_input_tensor_by_name=lambda request, name: types.SimpleNamespace(as_numpy=lambda: inputs[name]),
        ),
        _about=FrontConfig(manifest(), "drn"),
        _grounder=Grounder(_Network()),
        _videos=front._VideoCache(front.MAX_CACHED_BYTES),
        _is_first_call=False,
    )
    (response,) = model.execute([types.SimpleNamespace(request_id=lambda: "")])
    if isinstance(response, _TritonError):
        raise response
    return response


class _TritonError(GroundingError):
    INTERNAL, INVALID_ARG = "internal", "invalid"

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message, code=kind)


def _read_glove(path: Path) -> object:
    from train.network.glove import glove_vectors

    return glove_vectors(path, TABLE, 8)


def _hdf5() -> list[Reader]:
    import h5py

    def make(directory: Path, compressed: bool) -> list[Path]:
        options = {"chunks": (4, 8), "compression": "gzip", "shuffle": True, "fletcher32": True} if compressed else {}
        with h5py.File(directory / "features.hdf5", "w", libver="earliest" if compressed else "latest") as file:
            for name in ("v_a", "v_b"):
                file.create_group(name).create_dataset("c3d_features", data=CLIPS, **options)
            file.create_dataset("v_c", data=CLIPS, **options)
        return [directory / "features.hdf5"]

    def read(directory: Path, path: Path) -> None:
        """Read as the process of `runtime.core.io.hdf5_reader` does, without starting one for each case."""
        from runtime.core.io.hdf5_reader import Hdf5File

        file = Hdf5File(str(path))
        try:
            for name in ("v_a", "v_b", "v_c"):
                with contextlib.suppress(FeatureError):
                    file.answer([name], values=True)
        finally:
            # The library fails to close what it could not read.
            with contextlib.suppress(Exception):
                file.close()

    return [
        Reader("features-hdf5", functools.partial(make, compressed=False), read, crashes=True),
        Reader("features-hdf5-chunked", functools.partial(make, compressed=True), read, crashes=True),
    ]


def _parquet() -> list[Reader]:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    from runtime.corpus import feature_sources

    def make(directory: Path, nested: bool) -> list[Path]:
        features = [CLIPS.tolist()] * 3 if nested else [CLIPS.ravel().tolist()] * 3
        columns = {"video": ["a", "b", "c"], "duration": [30.5, 12.0, 9.0], "features": features}
        shape = {} if nested else {"shape": [list(CLIPS.shape)] * 3}
        options = {"compression": "zstd", "use_dictionary": False} if nested else {"row_group_size": 2}
        parquet.write_table(
            pa.table({**columns, "num_frames": [104, 104, None], **shape}), directory / "a.parquet", **options
        )
        return [directory / "a.parquet"]

    checkers: list[Connection] = []

    def check(files: Sequence[Path]) -> None:
        """Do as `check_metadata`, but in one process for all cases, because a new one imports pyarrow."""
        if not checkers:
            ours, theirs = multiprocessing.Pipe()
            fork = multiprocessing.get_context("fork")
            fork.Process(target=_check_metadata, args=(ours, theirs), daemon=True).start()
            theirs.close()
            checkers.append(ours)
        try:
            checkers[0].send(files[0])
            checkers[0].recv()
        except (EOFError, OSError) as error:
            checkers.clear()
            raise FeatureError(f"Reading the metadata of {files[0]} ended the process.", code="damaged_file") from error

    @mock.patch.object(feature_sources, "check_metadata", check)
    def read(directory: Path, path: Path) -> list[Any]:
        return _all(ParquetSource([path]))

    return [
        Reader("parquet-lists", functools.partial(make, nested=True), read),
        Reader("parquet-flat", functools.partial(make, nested=False), read),
    ]


def _check_metadata(ours: Connection, theirs: Connection) -> None:
    """Read the metadata of each Parquet file that is named, as the process of `parquet_check` does."""
    import pyarrow.parquet as parquet

    from runtime.corpus import parquet_check

    # Then the end of the other process ends this one.
    ours.close()
    with contextlib.suppress(EOFError):
        while True:
            path = theirs.recv()
            with contextlib.suppress(Exception):
                parquet_check._read_metadata(parquet.ParquetFile(path, memory_map=True, pre_buffer=False))
            theirs.send(None)


def _torch() -> list[Reader]:
    import torch

    from tests.export.narrow_i3d import flat, pytorch_i3d
    from train.checkpoints import Checkpoint, load, load_checkpoint, save, save_checkpoint
    from train.convert import load_vocabulary, read, read_config
    from train.extractors.c3d import C3D, C3DConfig
    from train.extractors.checkpoint import from_published, is_extractor_file, load_extractor, save_extractor
    from train.extractors.published import ExtractorCheckpoint
    from train.history import read_history
    from train.network import model
    from train.network.initialization import load_glove
    from train.network.model import DRN, DRNConfig
    from train.simulation.charades_actions import charades_plan
    from train.simulation.from_captions import captions_plan
    from train.training.run_config import with_config

    config = DRNConfig(6, 4, 8, 4, 4)
    # The published widths make files of 9 MB, in which damage rarely meets anything but weights.
    narrow = mock.patch.object(model, "BACKBONE_CHANNELS", (2, 2, 2))

    with narrow:
        weights = DRN(config).state_dict()
    published = {"state_dict": weights, "meta": {"epoch": 3, "cfg": "stage = 3"}}

    def saved(name: str, value: object, *, legacy: bool = False) -> Callable[[Path], list[Path]]:
        """Return a function that writes one file with torch."""

        def make(directory: Path) -> list[Path]:
            torch.save(value, directory / name, _use_new_zipfile_serialization=not legacy)
            return [directory / name]

        return make

    @narrow
    def read_published(path: Path) -> None:
        read_config(read(path).weights, path)

    def checkpoint(directory: Path) -> list[Path]:
        about = manifest()
        values = (about.features, about.vocabulary, about.decoding, weights, about.training, about.windows)
        save_checkpoint(directory / "drn.pt", Checkpoint(config, *values, about.presence))
        return [directory / "drn.pt"]

    @narrow
    def read_checkpoint(path: Path) -> None:
        is_extractor_file(path)
        _use(load_checkpoint(path).manifest())

    def content(directory: Path, make: Callable[[Path], list[Path]]) -> list[Path]:
        """Write a checkpoint and, as JSON to be damaged, what it holds beside the weights."""
        (path,) = make(directory)
        values = {name: value for name, value in load(path).items() if name not in ("weights", "digest")}
        (directory / "content.json").write_text(json.dumps(values))
        return [directory / "content.json"]

    @narrow
    def read_content(directory: Path, path: Path, name: str, loaded: Callable[[Path], object]) -> object:
        try:
            values = json.loads(path.read_text())
            source = load(directory / name)
            save(directory / "again.pt", {**values, "weights": source["weights"]})
        except (ValueError, TypeError, RecursionError, OverflowError):
            # Damage that leaves no table, or nothing that a checkpoint stores.
            return None
        return loaded(directory / "again.pt")

    c3d_config = C3DConfig((1,) * 8, 2)

    def c3d(directory: Path) -> list[Path]:
        extractor = C3D(c3d_config, (0.0, 0.0, 0.0)).state_dict()
        about = ExtractorCheckpoint(c3d_config, (1.0, 2.0, 3.0), extractor, {"c3d.pth": "0" * 64})
        save_extractor(directory / "c3d.pt", about)
        return [directory / "c3d.pt"]

    def flat_i3d(directory: Path) -> list[Path]:
        np.savez(directory / "i3d.npz", **flat(pytorch_i3d()))
        return [directory / "i3d.npz"]

    def read_i3d(path: Path) -> object:
        return from_published(read(path).weights, str(path), {}).model()

    @narrow
    def read_matrix(path: Path) -> object:
        return load_glove(DRN(config), path, TABLE)

    state = {"a": [1, {"b": torch.zeros(3)}], (1, 2): {3}}

    def charades(directory: Path) -> list[Path]:
        made = _charades(directory)
        rows = [
            ("id", "scene", "objects", "actions"),
            *((name, "Kitchen", "door;cup", "c077 1.5 9.25;c079 0 4") for name in ("AAAAA", "BBBBB")),
        ]
        for split in ("train", "test"):
            with open(directory / f"Charades_v1_{split}.csv", "w", newline="") as stream:
                csv.writer(stream).writerows(rows)
        return [*made, directory / "Charades_v1_train.csv", directory / "Charades_v1_test.csv"]

    losses = {f"loss_{name}": 0.5 for name in ("matching", "boundary", "iou")}
    history = [{"stage": 1, "epoch": epoch, "seconds": 1.0, **losses, "mIoU": 0.4} for epoch in range(3)]
    run_config = 'data: "charades"\nepochs: [3, 2, 1]\nlr: 1.0e-3\nblind: true\n'

    def read_twice(path: Path) -> object:
        return load(path), load(path, unknown_objects=True)

    def read_words(path: Path) -> object:
        return load_vocabulary(read_json(path, "the word table"), config, path)

    return [
        Reader("features-pt", saved("v.pt", torch.from_numpy(CLIPS)), reading(_load), _zip_again),
        Reader("features-pt-legacy", saved("v.pt", torch.from_numpy(CLIPS), legacy=True), reading(_load)),
        Reader("published-checkpoint", saved("drn.pth", published), reading(read_published), _zip_again),
        Reader("checkpoint", checkpoint, reading(read_checkpoint), _zip_again),
        Reader(
            "checkpoint-content",
            functools.partial(content, make=checkpoint),
            functools.partial(read_content, name="drn.pt", loaded=lambda path: load_checkpoint(path).manifest()),
        ),
        Reader("c3d", c3d, reading(lambda path: load_extractor(path).model()), _zip_again),
        Reader(
            "c3d-content",
            functools.partial(content, make=c3d),
            functools.partial(read_content, name="c3d.pt", loaded=lambda path: load_extractor(path).model()),
        ),
        Reader("published-i3d", flat_i3d, reading(read_i3d), _zip_again),
        Reader("glove-matrix", saved("glove.pt", torch.ones(len(TABLE) + 1, 4)), reading(read_matrix), _zip_again),
        Reader("torch-load", saved("a.pt", state), reading(read_twice), _zip_again),
        Reader(
            "run-config", written("run.yaml", run_config), reading(lambda path: with_config(["--config", str(path)]))
        ),
        Reader("charades-csv", charades, lambda directory, path: charades_plan(directory, None, 0)),
        Reader(
            "captions-plan",
            functools.partial(_captions, tacos=False),
            lambda directory, path: captions_plan(directory, 1, 0),
        ),
        Reader("history", written("history.jsonl", history), reading(read_history)),
        Reader("word-table", written("word2id.json", TABLE), reading(read_words)),
    ]


def _calib() -> list[Reader]:
    from calib.calibration_table import KEYS, CalibrationTable
    from calib.errors import CalibrationError
    from calib.quantization_plan import QuantizationPlan
    from calib.range_estimation import ValueRange
    from calib.rank_layers import FORMAT as RANKING_FORMAT
    from calib.rank_layers import ranked_names

    def table(directory: Path) -> list[Path]:
        ranked.save(directory / "t.json")
        return [directory / "t.json"]

    key = {**dict.fromkeys(KEYS, "0" * 64), "method": "minmax", "split": "train"}
    ranked = CalibrationTable({"a": ValueRange(-1.0, 2.0)}, key, ("v",))
    modules = [{"module": name, "share of multiply-adds": 0.5} for name in ("prop_fc", "fcos.head")]
    ranking = {"format": RANKING_FORMAT, "kind": "int8", "table": ranked.digest, "all": {}, "modules": modules}

    def plan(directory: Path) -> list[Path]:
        QuantizationPlan(("prop_fc",), "int8", "1" * 64, {"graph": "2"}, {"max_drop": 0.2}).save(directory / "p.json")
        return [directory / "p.json"]

    assert issubclass(CalibrationError, GroundingError)
    return [
        Reader("calibration-table", table, reading(CalibrationTable.load)),
        Reader("quantization-plan", plan, reading(QuantizationPlan.load)),
        Reader(
            "layer-ranking", written("ranking.json", ranking), reading(lambda path: ranked_names(path, ranked, "int8"))
        ),
    ]


def _service() -> list[Reader]:
    from runtime.service.http_errors import HttpError
    from runtime.service.uploaded_files import read_features

    def read_upload(path: Path) -> object:
        """Read an upload; a refusal, which the service answers with, is an error as of other readers."""
        try:
            return read_features(path, 1 << 20, 8)
        except HttpError as refusal:
            if not 400 <= refusal.status < 500:
                raise
            raise FeatureError(refusal.message) from refusal

    head = b'--b\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
    form = head % (b"query", b"", b"person opens") + head % (b"duration", b"", b"30.5")
    form += head % (b"features", b'; filename="v.npy"', npy(CLIPS)) + b"--b--\r\n"
    body = {"video": "v_a", "query": ["person opens the door"], "top_k": 3}

    def ask(kind: str) -> Callable[[Path, Path], object]:
        """Return a reader that sends a file as the body of a request to a service in this process."""
        service: list[Any] = []

        def read(directory: Path, path: Path) -> object:
            if not service:
                service.append(_planted_service(directory))
            status, content = asyncio.run(_post(service[0], kind, path.read_bytes()))
            if status >= 500:
                raise AssertionError(f"HTTP {status}: {content[:300]!r}")
            if status >= 400:
                raise FeatureError(json.loads(content)["error"]["message"])
            return content

        return read

    return [
        Reader("http-ground-json", written("body.json", body), ask("application/json")),
        Reader("http-ground-form", written("form", form), ask("multipart/form-data; boundary=b")),
        *(
            Reader(f"upload-{suffix}", functools.partial(_features, suffix=suffix), reading(read_upload))
            for suffix in ("npy", "npz", "npz-stored")
        ),
    ]


def _planted_service(directory: Path) -> Any:
    """Return the application of a service whose network finds nothing, with one video."""
    from runtime.service.app import application
    from runtime.service.service import Service, ServiceOptions
    from runtime.service.uploads import UploadOptions

    data = directory / "data"
    data.mkdir()
    _captions(data, tacos=False)
    options = ServiceOptions(uploads=UploadOptions(directory / "uploads"))
    return application(Service(Grounder(_Network()), DataSet(data), options=options))


async def _post(application: Any, kind: str, content: bytes) -> tuple[int, bytes]:
    """Return the status and the body of the answer to a question."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/ground",
        "raw_path": b"/v1/ground",
        "query_string": b"",
        "root_path": "",
        "headers": [
            (b"host", b"127.0.0.1:8000"),
            (b"content-type", kind.encode()),
            (b"content-length", str(len(content)).encode()),
        ],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
    }
    sent: list[dict[str, Any]] = []
    waiting = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if waiting:
            return waiting.pop()
        # The client stays until it is answered.
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await application(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:])


READERS = available()
