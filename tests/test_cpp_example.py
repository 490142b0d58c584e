"""Build examples/cpp and compare its moments with those of `Grounder`.

The library is that of the wheel of ONNX Runtime, which has no headers: `make headers` takes those of Debian 13.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

from export.to_onnx import to_onnx
from runtime.core.tokenizer import tokenize
from runtime.core.video import Video
from runtime.datasets.dataset import DataSet
from runtime.grounding.grounder import Grounder
from tests.raising import quotes
from tests.train.training.narrow import narrow_backbone

__all__ = ["narrow_backbone"]

SOURCE = Path(__file__).parents[1] / "examples" / "cpp"
HEADER = "onnxruntime_cxx_api.h"
# Of `make headers`, and of Debian 13.
INCLUDES = (Path(".venv/onnxruntime-headers/usr/include/onnxruntime"), Path("/usr/include/onnxruntime"))


@pytest.fixture(scope="module")
def include() -> Path:
    """Return the directory of ONNX Runtime's C++ headers, DRN_ONNXRUNTIME_INCLUDE or a usual one; skip without any."""
    named = os.environ.get("DRN_ONNXRUNTIME_INCLUDE")
    if named:
        assert (Path(named) / HEADER).is_file()
        return Path(named)
    directories = (SOURCE.parents[1] / path for path in INCLUDES)
    directory = next((path for path in directories if (path / HEADER).is_file()), None)
    if directory is None:
        pytest.skip(f"{HEADER} is missing: run `make headers`, or set DRN_ONNXRUNTIME_INCLUDE to its directory")
    return directory


@pytest.fixture(scope="module")
def program(include: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the program, linked with the library of the wheel."""
    if not shutil.which("cmake") or not shutil.which("g++"):
        pytest.skip("cmake or g++ is missing (apt install cmake g++)")
    libraries = list((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.1.*"))
    if len(libraries) != 1:
        pytest.skip("this wheel of ONNX Runtime has no libonnxruntime.so")
    directory = tmp_path_factory.mktemp("cpp")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (directory / name).symlink_to(libraries[0])
    subprocess.run(
        [
            *("cmake", "-S", SOURCE, "-B", directory / "build"),
            *(f"-DONNXRUNTIME_INCLUDE={include}", f"-DONNXRUNTIME_LIBRARY={directory / 'libonnxruntime.so'}"),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    subprocess.run(["cmake", "--build", directory / "build"], check=True, stdout=subprocess.DEVNULL)
    return directory / "build" / "ground"


@pytest.fixture(scope="module")
def model(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return drn.onnx, with drn.moments.onnx and drn.words.txt in its directory."""
    directory = tmp_path_factory.mktemp("model")
    return to_onnx(models / "drn.pt", directory / "drn.onnx", moments=True, max_query_length=16, opset=19)


def ground(program: Path, model: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    files = (model.with_suffix(".moments.onnx"), model.with_suffix(".words.txt"))
    return subprocess.run([program, *files, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_program_prints_the_moments_of_infer(program: Path, model: Path, planted: Path, tmp_path: Path) -> None:
    data, grounder = DataSet(planted), Grounder.load(model, "cpu")
    annotations = data.annotations("test")
    known = next(iter(grounder.manifest.vocabulary.words))
    extra = [f"{known.upper()}. ", f"{known}'s {known}, {known}", f"a Zyzzyva {known}"]
    for index, annotation in enumerate([*annotations, *annotations[: len(extra)]]):
        sentence = annotation.sentence if index < len(annotations) else extra[index - len(annotations)]
        video = data.video(annotation.video)
        features = tmp_path / f"{annotation.video}.npy"
        np.save(features, video.features.astype(np.float32))
        # Without a frame count, both estimate it from the number of clips.
        count = [video.num_frames] if index % 2 else []
        result = ground(program, model, features, video.duration, sentence, *count)
        assert result.returncode == 0, result.stderr
        actual = [[float(value) for value in line.split()] for line in result.stdout.splitlines()]
        read = Video.load(features, video.duration, *count)
        expected = grounder.ground(read, sentence)
        assert np.shape(actual) == (len(expected), 3)
        np.testing.assert_allclose(actual, [(one.start, one.end, one.score) for one in expected], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["segment_features", "moments"])
def test_program_names_the_tensor_that_is_not_float32(
    program: Path, model: Path, planted: Path, tmp_path: Path, name: str
) -> None:
    graph = onnx.load(model.with_suffix(".moments.onnx"))
    for node in graph.graph.node:
        for names in (node.input, node.output):
            names[:] = [f"{name}/float32" if other == name else other for other in names]
    if name == "moments":
        node = onnx.helper.make_node("Cast", [f"{name}/float32"], [name], to=TensorProto.FLOAT16)
        graph.graph.node.append(node)
    else:
        node = onnx.helper.make_node("Cast", [name], [f"{name}/float32"], to=TensorProto.FLOAT)
        graph.graph.node.insert(0, node)
    (value,) = (one for one in (*graph.graph.input, *graph.graph.output) if one.name == name)
    value.type.tensor_type.elem_type = TensorProto.FLOAT16
    onnx.save(graph, tmp_path / "half.moments.onnx")
    data = DataSet(planted)
    annotation = data.annotations("test")[0]
    video = data.video(annotation.video)
    np.save(tmp_path / "video.npy", video.features.astype(np.float32))
    words = model.with_suffix(".words.txt")
    command = [tmp_path / "half.moments.onnx", words, tmp_path / "video.npy", str(video.duration), annotation.sentence]
    result = subprocess.run([program, *command], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert quotes(result.stderr, name, "float16", "float32")


@pytest.mark.parametrize(
    "sentence", ["Person opens the door.", "a person's phone, then the dog's", "Tony's  coat. 3 cats,cups,", " , "]
)
def test_program_splits_sentences_like_the_tokenizer(program: Path, model: Path, tmp_path: Path, sentence: str) -> None:
    # With a list without these words, the program names every token before it rejects the sentence.
    words = tmp_path / "words.txt"
    count = len(model.with_suffix(".words.txt").read_text().splitlines())
    words.write_text("".join(f"zyzzyva{index}\n" for index in range(count)))
    command = [program, model.with_suffix(".moments.onnx"), words, "absent.npy", "1", sentence]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    *named, _ = result.stderr.splitlines()
    assert [re.fullmatch(r"The model does not know '(.*)'\.", line)[1] for line in named] == tokenize(sentence)


def test_program_rejects_what_it_does_not_support(program: Path, model: Path, planted: Path, tmp_path: Path) -> None:
    data = DataSet(planted)
    annotation = data.annotations("test")[0]
    video, sentence = data.video(annotation.video), annotation.sentence
    np.save(tmp_path / "video.npy", video.features.astype(np.float32))
    np.save(tmp_path / "half.npy", video.features.astype(np.float16))
    np.save(tmp_path / "narrow.npy", video.features[:, :5].astype(np.float32))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "video.npy").read_bytes()[:-1])
    not_finite = video.features.astype(np.float32)
    not_finite[1::2] = np.nan
    np.save(tmp_path / "nan.npy", not_finite)
    header = (tmp_path / "video.npy").read_bytes()
    shape = str(video.features.shape).encode()
    for name, other in (("digits", b"(" + b"1" * 60_000 + b", 8)"), ("wraps", b"(288230376151711745, 64)")):
        text = header[10 : header.index(b"\n")].rstrip().replace(shape, other) + b"\n"
        (tmp_path / f"{name}.npy").write_bytes(header[:8] + len(text).to_bytes(2, "little") + text + bytes(64))
    for file, seconds, text in (
        ("nan.npy", video.duration, sentence),
        ("digits.npy", video.duration, sentence),
        ("wraps.npy", video.duration, sentence),
        ("video.npy", video.duration, "person,, opens the door"),
        ("video.npy", video.duration, 'person "opens" the door'),
        ("video.npy", video.duration, "person cannot open the door"),
        ("video.npy", video.duration, "zyzzyva"),
        ("video.npy", video.duration, " ".join([sentence] * 10)),
        ("video.npy", -1, sentence),
        ("video.npy", "nan", sentence),
        ("video.npy", 1e6, sentence),
        # Half a frame and 250 frames per second.
        ("video.npy", 2 * video.num_frames, sentence),
        ("video.npy", video.num_frames / 250, sentence),
        ("half.npy", video.duration, sentence),
        ("narrow.npy", video.duration, sentence),
        ("cut.npy", video.duration, sentence),
        ("absent.npy", video.duration, sentence),
    ):
        result = ground(program, model, tmp_path / file, seconds, text)
        assert (result.returncode, result.stdout) == (2, ""), (file, seconds, text)
        assert result.stderr.splitlines()[-1].startswith("error: ")
    for frames in ("0", "1", "928.5", "nan", str(100 * video.num_frames), str(video.num_frames // 3)):
        result = ground(program, model, tmp_path / "video.npy", video.duration, sentence, frames)
        assert (result.returncode, result.stdout) == (2, ""), frames
    words = model.with_suffix(".words.txt").read_text().splitlines(keepends=True)
    for name, lines in (("short", words[:-1]), ("long", [*words, "zyzzyva\n"])):
        (tmp_path / name).write_text("".join(lines))
        command = [program, model.with_suffix(".moments.onnx"), tmp_path / name, tmp_path / "video.npy"]
        result = subprocess.run([*command, str(video.duration), sentence], capture_output=True, text=True, check=False)
        assert (result.returncode, result.stdout) == (2, ""), name
        assert quotes(result.stderr, tmp_path / name, len(lines), len(words))
