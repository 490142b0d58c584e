"""Test `runtime.artifacts.encoded_video` and pairs: videos are encoded once, and only their model accepts them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import EncodedVideo, Grounder, Video
from runtime.artifacts.encoded_video import EncodedWindows
from runtime.artifacts.manifest import METADATA_KEY, Manifest
from runtime.backends import open_backend
from runtime.core.decoding import NON_FINITE, Decoding
from runtime.core.errors import DeviceError, FeatureError, GroundingError, ModelFileError, ShapeError
from runtime.core.sliding_windows import Windows
from runtime.datasets.dataset import DataSet
from runtime.describe import describe
from runtime.grounding.evaluation import evaluate
from runtime.grounding.scheduling import EncodingCache
from runtime.grounding.words import words
from runtime.infer import infer
from tests.raising import raises
from tests.runtime.planted import PAIRS, QUARTER, Exponential, PlantedBackend, PlantedPair, video

onnx = pytest.importorskip("onnx", reason="onnx writes the graphs that are opened here")


@pytest.fixture
def pair() -> PlantedPair:
    return PlantedPair(PlantedBackend())


@pytest.fixture
def grounder(pair: PlantedPair) -> Grounder:
    return Grounder(pair)


def test_encoded_video_gives_same_moments_as_video(grounder: Grounder) -> None:
    expected = Grounder(PlantedBackend()).ground_batch(PAIRS)
    assert grounder.ground_batch(PAIRS) == expected
    encoded = [(grounder.encode(video), query) for video, query in PAIRS]
    assert grounder.ground_batch(encoded) == expected
    mixed = [encoded[i] if i % 2 else PAIRS[i] for i in range(len(PAIRS))]
    assert grounder.ground_batch(mixed, batch_size=2) == expected
    assert [grounder.ground(*pair) for pair in encoded] == expected


def test_offset_video_moments_are_in_player_time(grounder: Grounder, tmp_path: Path) -> None:
    plain = video(10.0, cat=(0, 3))
    late = dataclasses.replace(plain, offset=4.0)
    expected = [
        dataclasses.replace(moment, start=4.0 + moment.start, end=4.0 + moment.end)
        for moment in grounder.ground(plain, "cat")
    ]
    encoded = grounder.encode(late)
    encoded.save(tmp_path / "late.npz")
    assert isinstance(encoded, EncodedVideo)
    for subject in (late, encoded, EncodedVideo.load(tmp_path / "late.npz")):
        assert grounder.ground(subject, "cat") == expected
        assert grounder.ground_batch([(subject, "cat"), (plain, "dog")])[0] == expected
    # In windows, and without a likely location in any of them.
    grounder.windows = Windows(4.0, 4.0, 2.0)
    for word in ("cat", "dog"):
        shifted = grounder.ground_batch([(late, word)])[0]
        unshifted = grounder.ground_batch([(plain, word)])[0]
        assert [m.start - 4 for m in shifted] == pytest.approx([m.start for m in unshifted])
        assert [m.end - 4 for m in shifted] == pytest.approx([m.end for m in unshifted])
    windows = grounder.encode(late)
    assert isinstance(windows, EncodedWindows)
    windows.save(tmp_path / "windows.npz")
    assert EncodedWindows.load(tmp_path / "windows.npz").offset == 4.0


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("windows", [False, True])
def test_encoding_of_another_scale_is_no_damage(damaged: bool, windows: bool) -> None:
    grounder = Grounder(PlantedPair(Exponential(PlantedBackend(), damaged)))
    if windows:
        grounder.windows = Windows(30.0, 30.0, 10.0)
    encoded = grounder.encode(Video(3000 * QUARTER.features, QUARTER.num_frames, 60.0, "scaled"))
    error, code = (ModelFileError, NON_FINITE) if damaged else (FeatureError, "features_out_of_scale")
    with raises(error, code):
        grounder.ground_batch([(encoded, "dog")])
    with raises(error, code):
        grounder.ground(encoded, "dog")


def test_each_video_and_sentence_is_encoded_and_batched_once(
    grounder: Grounder, pair: PlantedPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    vocabulary = type(grounder.manifest.vocabulary)
    encode = vocabulary.encode
    monkeypatch.setattr(
        vocabulary, "encode", lambda self, text, *rest, **named: read.append(text) or encode(self, text, *rest, **named)
    )
    subject = video(10.0, cat=(0, 3))
    grounder.ground_batch([(subject, "cat"), (QUARTER, "dog"), (subject, "dog"), (subject, "cat")])
    assert pair.encoded == 2
    assert pair.requests == [(4, 2)]
    assert read == ["cat", "dog"]
    grounder.ground(subject, "person cat")
    assert pair.encoded == 2


def test_encoding_cache_is_bounded_and_drops_removed_videos(grounder: Grounder, pair: PlantedPair) -> None:
    grounder._encodings = EncodingCache(2)
    subjects = [video(10.0 + index, cat=(0, 3)) for index in range(3)]
    for index, encoded in ((0, 1), (1, 2), (2, 3), (1, 3), (0, 4)):
        grounder.ground(subjects[index], "cat")
        assert pair.encoded == encoded
    # Another video at a cached address: the reference differs.
    stranger = video(99.0, dog=(0, 3))
    cached = grounder._encodings._encodings
    entry = cached.pop(id(subjects[0]))
    assert entry is not None
    cached.put(id(stranger), entry)
    assert grounder.ground(stranger, "dog")[0].end == pytest.approx(99 / 8)


def test_encoding_survives_save_and_load(grounder: Grounder, tmp_path: Path) -> None:
    encoded = grounder.encode(QUARTER)
    encoded.save(tmp_path / "deep" / "video.npz")
    back = EncodedVideo.load(tmp_path / "deep" / "video.npz")
    for name, value in vars(encoded).items():
        np.testing.assert_array_equal(getattr(back, name), value)
    assert back.features.dtype == np.float32
    assert grounder.ground(back, "dog") == grounder.ground(QUARTER, "dog")


def test_encoding_key_depends_on_video_and_model() -> None:
    one, other = (Grounder(PlantedPair(PlantedBackend(), digit * 64)) for digit in "12")
    keys = [
        one.encode(QUARTER).key,
        one.encode(video(60.0, dog=(8, 16))).key,
        other.encode(QUARTER).key,
        Grounder(PlantedPair(PlantedBackend(Decoding(num_segments=64)))).encode(QUARTER).key,
    ]
    assert len(set(keys)) == 4
    # Name and duration are not inputs of the network.
    assert one.encode(video(30.0, dog=(8, 15))).key == keys[0]


def _change(name: str) -> Callable[[Path, EncodedVideo], object]:
    """Return a function that saves an encoding after changing an array without its digest."""

    def save(path: Path, encoded: EncodedVideo) -> None:
        array = getattr(encoded, name)
        object.__setattr__(encoded, name, array + 1 if name == "features" else array[1:])
        encoded.save(path)

    return save


DAMAGE: dict[str, tuple[Callable[[Path, EncodedVideo], object], str]] = {
    "missing": (lambda path, encoded: path.unlink(), "missing_file"),
    "truncated": (lambda path, encoded: path.write_bytes(path.read_bytes()[:-200]), "damaged_file"),
    "changed": (_change("features"), "digest_mismatch"),
    "shapes": (_change("spans"), "wrong_array"),
    "pickle": (
        lambda path, encoded: np.savez(
            path, about=np.array([{}], object), features=encoded.features, spans=encoded.spans
        ),
        "damaged_file",
    ),
    "incomplete": (lambda path, encoded: np.savez(path, features=encoded.features), "damaged_file"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_encoding_is_rejected_with_one_line(grounder: Grounder, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "video.npz"
    write, code = DAMAGE[damage]
    encoded = grounder.encode(QUARTER)
    encoded.save(path)
    write(path, encoded)  # type: ignore[arg-type]
    with raises(FeatureError, code):
        EncodedVideo.load(path)


# Files of version 0.1 have no digest, so only invalid values are detected.
@pytest.mark.parametrize(
    ("change", "without_digest"),
    [
        ({"duration": 3200.0}, True),
        ({"name": "another"}, True),
        ({"duration": "32"}, False),
        ({"duration": True}, False),
        ({"offset": -9.0}, False),
        ({"offset": 1e300}, False),
    ],
)
def test_edited_encoding_metadata_is_rejected(
    grounder: Grounder, tmp_path: Path, change: dict[str, Any], without_digest: bool
) -> None:
    path = tmp_path / "video.npz"
    grounder.encode(QUARTER).save(path)
    with np.load(path) as archive:
        arrays = dict(archive)
    facts = {**json.loads(str(arrays["about"])), **change}
    np.savez(path, **{**arrays, "about": np.array(json.dumps(facts))})
    with raises(FeatureError, "damaged_file", path):
        EncodedVideo.load(path)
    del facts["digest"]
    np.savez(path, **{**arrays, "about": np.array(json.dumps(facts))})
    with contextlib.nullcontext() if without_digest else raises(FeatureError, "damaged_file", path):
        EncodedVideo.load(path)


def test_encoded_video_rejects_invalid_arrays() -> None:
    features, spans = np.zeros((8, 4), np.float32), np.zeros((4, 2), np.float32)
    for wrong in ((features, spans[1:], 1.0), (features[0], spans, 1.0), (features.astype(int), spans, 1.0)):
        with raises(FeatureError, "wrong_array", wrong[0].shape, wrong[1].shape):
            EncodedVideo(*wrong)
    with raises(GroundingError, "invalid_frame_count", "nan"):
        EncodedVideo(features, spans, float("nan"))


def test_encoding_of_another_model_or_width_is_rejected(pair: PlantedPair) -> None:
    grounder, unsplit = Grounder(pair), Grounder(PlantedBackend())
    other = Grounder(PlantedPair(PlantedBackend(), "2" * 64)).encode(QUARTER)
    with raises(FeatureError, "encoding_of_another_model", "dog", "2" * 12, "1" * 12):
        grounder.ground(other, "dog")
    encoded = grounder.encode(QUARTER)
    narrow = dataclasses.replace(encoded, features=encoded.features[:5], key="")  # type: ignore[union-attr]
    with raises(FeatureError, "shape_mismatch", "dog", (5, 32), (8, 32)):
        grounder.ground(narrow, "dog")
    assert pair.requests == []
    with raises(FeatureError, "feature_width_mismatch", "dog", 9, 8):
        grounder.encode(video(10.0, dim=9, dog=(0, 3)))
    with raises(ModelFileError, "query_part_required", "python -m export.to_onnx --split"):
        unsplit.encode(QUARTER)
    with raises(ModelFileError, "query_part_required", "dog"):
        unsplit.ground(encoded, "dog")


def test_encode_with_prepare_returns_the_plain_encoding(grounder: Grounder, caplog: pytest.LogCaptureFixture) -> None:
    encoded = grounder.encode(QUARTER, prepare=True)
    assert (encoded.key, encoded.prepared) == (grounder.encode(QUARTER).key, None)  # type: ignore[union-attr]
    assert len(caplog.records) == 1


@pytest.fixture
def copied(pair_files: Path, tmp_path: Path) -> Path:
    for path in pair_files.parent.iterdir():
        shutil.copy(path, tmp_path)
    return tmp_path / pair_files.name


def test_video_part_alone_is_rejected(pair_files: Path) -> None:
    video = pair_files.with_name("tiny.video.onnx")
    for opened in (open_backend, describe, words):
        with raises(ModelFileError, "model_part", video, pair_files):
            opened(video)


def test_missing_or_changed_video_part_is_rejected(copied: Path) -> None:
    part = copied.with_name("tiny.video.onnx")
    part.write_bytes(part.read_bytes() + b"\0")
    with raises(ModelFileError, "digest_mismatch", part, copied.name):
        open_backend(copied, "cpu")
    part.unlink()
    with raises(ModelFileError, "missing_file", copied, part.name):
        open_backend(copied, "cpu")
    model = onnx.load(copied)
    manifest = Manifest.from_json(model.metadata_props[0].value)
    onnx.helper.set_model_props(model, {METADATA_KEY: dataclasses.replace(manifest, video_part={}).to_json()})
    onnx.save(model, copied)
    with raises(ModelFileError, "missing_part", copied, 0):
        open_backend(copied, "cpu")


def test_infer_with_query_part(pair_files: Path, tiny_model: Path, mini: Path, run_command: Any) -> None:
    words = ("--data", mini, "--device", "cpu", "--video", "AAAA1", "--query", "person opens the door")
    outcome, expected = (run_command(infer, "--model", model, *words) for model in (pair_files, tiny_model))
    assert outcome.out == expected.out


def test_split_evaluation_equals_full_and_encodes_once(
    pair_files: Path, tiny_model: Path, mini: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_set = DataSet(mini)
    annotations = data_set.annotations("test")
    expected = evaluate(Grounder.load(tiny_model, "cpu"), data_set, annotations)
    split = Grounder.load(pair_files, "cpu")
    encoded: list[int] = []
    original = split.backend.encode  # type: ignore[attr-defined]
    monkeypatch.setattr(split.backend, "encode", lambda rows: encoded.append(len(rows)) or original(rows))
    actual = evaluate(split, data_set, annotations, batch_size=2)
    assert actual.report == expected.report
    np.testing.assert_array_equal(actual.detections[0.5], expected.detections[0.5])
    assert sum(encoded) == len({annotation.video for annotation in annotations})


def test_bound_tensors_equal_arrays_and_stay_on_device(
    pair_files: Path, tiny_model: Path, mini: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Emulate a GPU: tensors are bound, and the last encodings are cached."""
    monkeypatch.setattr("runtime.backends.onnx_backend.MAX_ENCODINGS_ON_DEVICE", 2)
    data_set = DataSet(mini)
    subjects = [data_set.video(name) for name in ("AAAA1", "BBBB2", "CCCC3")]
    pairs = [(subject, query) for subject in subjects for query in ("person opens the door", "person sits")]
    expected = Grounder.load(tiny_model, "cpu").ground_batch(pairs)
    split = Grounder.load(pair_files, "cpu")
    backend: Any = split.backend
    placed: list[int] = []
    original = backend._query.to_device
    monkeypatch.setattr(backend._query, "to_device", lambda array: placed.append(len(array)) or original(array))
    for session in (backend._query, backend._video):
        monkeypatch.setattr(session, "uses_io_binding", True)
    assert [split.ground(*pair) for pair in pairs] == expected
    assert placed == [1, 1, 1]
    assert split.ground(*pairs[0]) == expected[0]
    assert placed == [1] * 4
    assert split.ground_batch(pairs) == expected
    with raises(ShapeError, "shape_mismatch", "segment_features"):
        backend.encode(np.zeros((1, 32, 5), np.float32))
    monkeypatch.setattr("os.getpid", lambda: -1)
    # Neither with cached nor with new encodings.
    monkeypatch.setattr("onnxruntime.OrtValue.ortvalue_from_numpy", lambda *_: pytest.fail("CUDA was touched"))
    for pair in (pairs[0], pairs[2]):
        with raises(DeviceError, "forked_process"):
            split.ground(*pair)
