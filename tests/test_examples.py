"""The examples run."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from export.to_onnx import to_onnx
from runtime.artifacts.manifest import Features
from runtime.core.decoding import Decoding
from runtime.core.io.input_files import read_json
from runtime.datasets.dataset import DataSet
from train.checkpoints import Checkpoint, save_checkpoint
from train.network.model import DRNConfig
from train.training.trainer import fresh_model

ROOT = Path(__file__).parents[1]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(planted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained small network for the planted data set, exported."""
    data_set = DataSet(planted)
    # The sizes and the opset of `models`, whose traced graph is used again.
    config = DRNConfig(vocab_size=len(data_set.words), embed_dim=16, feature_dim=32, hidden_dim=16, fpn_dim=32)
    directory = tmp_path_factory.mktemp("model")
    # A head that was never trained finds no location likely; half of them are after this.
    network = fresh_model(config, seed=0)
    network.fcos.head.cls_logits.bias.data.zero_()
    features = Features(dim=32)
    checkpoint = Checkpoint(config, features, data_set.vocabulary, Decoding(), network.state_dict(), {"stage": 3})
    save_checkpoint(directory / "drn.pt", checkpoint)
    return to_onnx(directory / "drn.pt", directory / "drn.onnx", split=True, max_query_length=16, opset=19)


def test_ground_many_lists_every_test_video(model: Path, planted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load("ground_many").main(str(model), str(planted), "person opens the door")
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert listed == {annotation.video for annotation in DataSet(planted).annotations("test")}


def test_example_writes_a_valid_video(tmp_path: Path) -> None:
    video_file = pytest.importorskip("runtime.media.video_file")
    pytest.importorskip("av", reason="PyAV writes the film")
    film = load("film")
    film.SECONDS = 2
    film.main(str(tmp_path / "clip.mp4"))
    found = video_file.probe(tmp_path / "clip.mp4")
    assert (found.num_frames, found.duration, found.damage) == (50, 2, "")
    dawn, noon, night = video_file.frames_at(found, [0.0, 1.0, 1.96], film.HEIGHT)
    assert dawn.mean() < noon.mean() > night.mean()


def test_demo_uses_existing_commands(planted: Path) -> None:
    demo = load("demo")
    video, sentences = demo.longest_story(planted)
    told = {annotation.sentence for annotation in DataSet(planted).annotations("test") if annotation.video == video}
    assert set(sentences) <= told
    source = (ROOT / "examples" / "demo.py").read_text()
    for name in ("train.simulate", "train", "export.to_onnx", "runtime.infer", "runtime.evaluate"):
        assert f'show("{name}"' in source
        assert importlib.util.find_spec(name) is not None


def test_cpu_benchmark_runs_and_writes_report(model: Path, tmp_path: Path) -> None:
    from benchmarks.cpu import benchmark

    output = tmp_path / "cpu.json"
    benchmark(model.with_suffix(".pt"), model, samples=4, batch=4, pairs=20, videos=10, training=False, output=output)
    report = read_json(output, "report")
    assert report["speed-up over eager, batch 1"] > 0
    assert len(report["times eager"]) == 5
    assert all(0 < share < 1 for name, share in report["the limit"].items() if name.endswith("of the limit"))


def test_multiply_adds_match_the_published_network() -> None:
    from benchmarks.multiply_adds import drn_multiply_adds

    work = drn_multiply_adds(DRNConfig(), 8)
    assert work["video"] == 4096 * 4096 * 32
    # 893 million for a pair with 8 words, of which 6 are positions, that are folded.
    assert (work["video"] + work["first"] + work["rest"]) / 1e6 == pytest.approx(893 - 6.3, abs=1)


def test_rewritings_benchmark_writes_time_ratios(model: Path, tmp_path: Path) -> None:
    from benchmarks.studies.graph_optimization_ablation import rewritings

    output = tmp_path / "rewritings.json"
    rewritings(
        model.with_suffix(".pt"),
        samples=2,
        batch=2,
        only=("bidirectional", "Scan", "by level", "denormals"),
        output=output,
    )
    results = read_json(output, "report")["time over that of the graph as exported"]
    assert len(results["2 x 8 words"]) == 6
    assert all(ratio > 0 for ratio in results["2 x 8 words"].values())
