"""Run the commands of the README and of docs/ on small inputs: all that are neither marked nor run by another file.

The inputs have the names that the pages use and the layouts of the published files. Options in `SMALLER` are added, so
that a network trains in a second.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtime.artifacts.extractor_manifest import ExtractorManifest
from runtime.core import command_list
from runtime.corpus.worker import Worker
from runtime.datasets.dataset import DataSet
from runtime.evaluate import evaluate
from tests.annotated import write_activitynet
from tests.contract_recorder import command_function
from tests.documented import DEFAULT_RUNNER, EXTRAS, ROOT, lines_run_by
from tests.films import film
from tests.runtime.media.extractor_graphs import write_clips
from tests.train.training.narrow import narrow_backbone
from train.checkpoints import load_checkpoint

__all__ = ["narrow_backbone"]

h5py = pytest.importorskip("h5py", reason="h5py writes features")
pyarrow = pytest.importorskip("pyarrow", reason="pyarrow writes features")
parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow writes features")
for name in ("fastapi", "matplotlib", "jinja2"):
    pytest.importorskip(name, reason="commands of the pages need all extras")

DIM = 32
LINES = lines_run_by(DEFAULT_RUNNER)
INSTALL = re.compile(r"pip install '\.\[([\w,]+)\]'( +#.*)?")
SMALLER = {
    # The sizes of `models`, whose traced graph is used again.
    "train": "--epochs 1 --batch-size 32 --hidden-dim 16 --fpn-dim 32 --iou-target all --device cpu",
    "build-engine": "--max-drop 100",
    "compare": "--samples 2 --batch 1",
    "fit-presence": "--mismatched 1 --held-out 0.3",
}
# The data set has fewer videos, and a network of one epoch answers too few queries for a threshold.
REPLACED = {"--videos 100": "--videos 3", "fit-presence --model RUN/drn.pt": "fit-presence --model drn.pt"}


@pytest.fixture(scope="module")
def inputs(split_models: Path, planted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with everything that the pages start from."""
    directory = tmp_path_factory.mktemp("inputs")
    shutil.copytree(planted, directory / "charades", ignore=shutil.ignore_patterns("cache"))
    for name in ("DIR", "data"):
        (directory / name).symlink_to("charades")
    for path in split_models.iterdir():
        shutil.copy(path, directory)
    state = load_checkpoint(directory / "drn.pt").model().state_dict()
    meta = {"cfg": "model = dict(is_first_stage=False, is_second_stage=False)"}
    published = "drn_2xb16-4096-10e_c3d-feature_20230809-ec0429a6.pth"
    torch.save({"meta": meta, "state_dict": state}, directory / published)
    write_clips(directory / "c3d.onnx", ExtractorManifest("C3D", DIM, 16, 8, (24, 32), (24, 24), (1.0, 2.0, 3.0)))
    film(directory / "clip.mp4", 60)
    write_corpus(directory, DataSet(planted))
    write_word_vectors(directory, DataSet(planted))
    write_predictions(directory, directory / "drn.onnx", DataSet(planted))
    write_own_data(directory)
    return directory


def write_corpus(directory: Path, data_set: DataSet) -> None:
    """Write a query, and features in Parquet."""
    (directory / "queries.jsonl").write_text(json.dumps({"query": "person opens the door"}) + "\n")
    videos = [data_set.video(name) for name in sorted(data_set.durations)]
    columns = {
        "video": [video.name for video in videos],
        "duration": [video.duration for video in videos],
        "features": [video.features.tolist() for video in videos],
    }
    parquet.write_table(pyarrow.table(columns), directory / "features.parquet")


def write_word_vectors(directory: Path, data_set: DataSet) -> None:
    """Write ActivityNet Captions with its features, and word vectors in both formats."""
    rng = np.random.default_rng(0)
    activitynet = DataSet(write_activitynet(directory / "activitynet"))
    for name in ("c3d.hdf5", "sub_activitynet_v1-3.c3d.hdf5"):
        with h5py.File(directory / name, "w") as file:
            for video, duration in activitynet.durations.items():
                features = rng.random((int(duration * 3), DIM), np.float32)
                file.create_group(video).create_dataset("c3d_features", data=features)
    words = {word for row in activitynet.annotations("train") for word in row.sentence.lower().rstrip(".").split()}
    rows = [" ".join([word, *(f"{value:.3f}" for value in rng.normal(size=300))]) for word in sorted(words)]
    (directory / "glove.6B.300d.txt").write_text("\n".join(rows) + "\n")
    torch.save(torch.from_numpy(rng.normal(size=(1 + len(data_set.words), 300))).float(), directory / "glove_weights")


def write_predictions(directory: Path, model: Path, data_set: DataSet) -> None:
    """Write predictions for the test split, and its ground truth in the format of QVHighlights too."""
    evaluate(model, data_set.root, predictions=directory / "predictions.jsonl", threads=1)
    predictions = map(json.loads, (directory / "predictions.jsonl").read_text().splitlines())
    truths = [
        {
            **{key: prediction[key] for key in ("qid", "query", "vid")},
            "duration": data_set.durations[row.video],
            "relevant_windows": [list(moment) for moment in row.moments],
        }
        for row, prediction in zip(data_set.annotations("test"), predictions, strict=True)
    ]
    (directory / "qvhighlights").mkdir()
    for path in (directory, directory / "qvhighlights"):
        (path / "highlight_val_release.jsonl").write_text("".join(json.dumps(row) + "\n" for row in truths))


def write_own_data(directory: Path) -> None:
    """Write the videos of the page on own data, and its annotations: those of the page, and more for training."""
    (directory / "videos").mkdir()
    names = [f"kitchen_{number:02d}" for number in range(1, 9)]
    for name in names:
        film(directory / "videos" / f"{name}.mp4", 60)
    (lines,) = re.findall(r"```json\n(.*?)```", (ROOT / "docs" / "own-data.md").read_text("utf-8"), re.DOTALL)
    (directory / "mine").mkdir()
    rows = [json.loads(line) for line in lines.splitlines()]
    # As many as INT8 needs for calibration, of several videos.
    more = [
        {**row, "vid": name, "duration": 41.0, "qid": 1000 * number + 10 * repeat + row["qid"]}
        for number, name in enumerate(names[2:7], 1)
        for repeat in range(4)
        for row in rows
    ]
    others = [{**row, "vid": names[7], "duration": 41.0} for row in rows[:2]]
    for split, content in {"train": [*rows, *more], "val": others, "test": others}.items():
        (directory / "mine" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))


@pytest.fixture
def directory(inputs: Path, tmp_path: Path) -> Iterator[Path]:
    """A working directory with the inputs; commands may replace files, but not change them."""
    for path in inputs.iterdir():
        if path.suffix in (".pt", ".onnx"):
            shutil.copy(path, tmp_path)
        else:
            (tmp_path / path.name).symlink_to(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setenv("DRN_CACHE", str(inputs / "cache"))
        patch.setattr("runtime.benchmarking.timing.WINDOW_SECONDS", 0.0)
        # The service runs until a signal, and Ray has its own test.
        patch.setattr(importlib.import_module("runtime.service.server"), "run", lambda *_: None)
        patch.setattr("runtime.corpus.job.run_on_ray", lambda job, shards, *_: map(Worker(job), shards))
        yield tmp_path


def smaller(line: str) -> list[str]:
    """Return the words of a command after `drn`, with the options of `SMALLER`."""
    for before, after in REPLACED.items():
        line = line.replace(before, after)
    _, name, *words = shlex.split(line, comments=True)
    extra = SMALLER.get(name, "").split()
    if name == "train" and "--glove" not in words:
        extra += ["--embed-dim", "16"]
    if "int8" in words:
        extra += ["--calib-method", "minmax", "--calib-samples", "32", "--limit", "8"]
    return [name, *words, *extra]


def pages() -> list[str]:
    """Return the pages with a command that is on no earlier page."""
    seen: dict[str, str] = {}
    for line in LINES:
        seen.setdefault(" ".join(shlex.split(line.text, comments=True)), line.page)
    return list(dict.fromkeys(seen.values()))


@pytest.mark.parametrize("page", pages())
def test_commands_of_a_page_run(page: str, directory: Path, run_command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if page == "your-own-video":
        (directory / "runs" / "charades").mkdir(parents=True)
        shutil.copy(directory / "drn.pt", directory / "runs" / "charades")
    for text in (line.text for line in LINES if line.page == page):
        if extras := INSTALL.fullmatch(text):
            assert set(extras[1].split(",")) <= set(EXTRAS), text
            continue
        while assignment := re.match(r"([A-Z_]+)=(\S+) ", text):
            monkeypatch.setenv(assignment[1], assignment[2])
            text = text[assignment.end() :]
        assert text.startswith("drn "), f"{text} needs a test, or a comment '# not run here: REASON'"
        name, *words = smaller(text)
        if name.startswith("-"):
            monkeypatch.setattr("sys.argv", ["drn", name])
            with pytest.raises(SystemExit, match="0"):
                command_list.main()
            continue
        run_command(command_function(command_list.MODULES[name]), *words)
