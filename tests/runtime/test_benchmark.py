"""Test `python -m runtime.benchmark`: all cases of all kinds of models, and results after an interruption."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runtime import Grounder, Vocabulary
from runtime.benchmark import benchmark
from runtime.benchmarking import runner
from runtime.benchmarking.report import latency_table, read_report
from runtime.benchmarking.workload import dataset_workload, synthetic_workload
from runtime.core.batch import Batch, Heads
from runtime.core.errors import DeviceMemoryError, ModelFileError, QueryError, ShapeError
from runtime.core.io.digests import sha256
from tests.raising import check_error, quotes, raises, records
from tests.runtime.planted import PlantedBackend, PlantedPair


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use short measurements, no GPU, and no new processes."""
    monkeypatch.setattr("runtime.benchmarking.timing.WINDOW_SECONDS", 0.0)
    monkeypatch.setattr("runtime.core.gpu_info.shutil.which", lambda _: None)
    monkeypatch.setattr(runner, "cold_start", lambda *_: 1.25)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[Path]]:
    """Write empty files that open as these backends, in turn."""

    def files(**backends: Any) -> list[Path]:
        known = {}
        for name, backend in backends.items():
            path = tmp_path / f"{name}.onnx"
            path.write_text(name)
            known[path] = backend
        monkeypatch.setattr(Grounder, "load", lambda path, device, threads: Grounder(known[path]))
        return list(known)

    return files


def measured(report: dict[str, Any]) -> dict[tuple[str, str, str], list[int]]:
    """Return the measured sizes of each group, boundary and case."""
    actual: dict[tuple[str, str, str], list[int]] = {}
    for timing in report["timings"]:
        case = timing["case"]
        actual.setdefault((case["group"], case["boundary"], case["name"]), []).append(case["size"])
    return actual


WHOLE = {
    ("one query", "end to end", "new video"): [1],
    ("one query", "end to end", "known video"): [1],
    ("one query", "host", "network"): [1],
    ("batch size", "end to end", "known videos"): [1, 2, 3],
    ("batch size", "host", "network"): [1, 2, 3],
    ("queries per video", "end to end", "known video"): [1, 2, 3],
}


def test_benchmark_of_one_model_writes_complete_report(
    tiny_model: Path, tmp_path: Path, run_command: Any, caplog: pytest.LogCaptureFixture
) -> None:
    output, plot = tmp_path / "r.json", tmp_path / "r.png"
    arguments = ("--model", tiny_model, "--samples", 20, "--batch", 3, "--threads", 1, "--output", output)
    outcome = run_command(benchmark, *arguments, "--plot", plot)
    message = caplog.records[-1].getMessage()
    assert message == f"\nNext:  python -m runtime.serve --model {tiny_model} --data DIR"
    report = json.loads(output.read_text())
    assert (report["format"], report["interrupted"], report["inputs"]["made_up"]) == ("drn-benchmark/1", False, True)
    assert measured(report) == {**WHOLE, ("query length", "host", "network"): [1, 2, 4, 8, 13]}
    for timing in report["timings"]:
        latency = timing["latency"]
        assert (latency["samples"], latency["p99_ms"]) == (20, None)
        assert 0 < latency["p50_ms"] <= latency["p95_ms"] <= latency["max_ms"]
        assert timing["queries_per_s"] > 0
        assert len(timing["warm_up"]["windows_ms"]) >= 3
    (model,) = report["models"]
    assert (model["sha256"], model["memory"]["files"]) == (sha256(tiny_model), tiny_model.stat().st_size)
    assert (model["kind"], model["device"], model["cold_start_s"]) == ("whole", "cpu", 1.25)
    assert 0 < model["open_s"] <= model["first_answer_s"]
    phases = {"tokenise", "segment", "collate", "network", "decode", "NMS", "seconds"}
    assert [(row["queries"], set(row["ms"])) for row in report["phases"]] == [(1, phases), (3, phases)]
    assert [state["when"] for state in report["conditions"]][:2] == ["before", "after one query"]
    notes = " ".join(report["notes"])
    assert "20 samples were taken" in notes
    assert "no times of the GPU only, because it runs on the CPU" in notes
    assert "Synthetic inputs" in outcome.out
    assert "overhead, known" in outcome.out
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert len(latency_table(read_report(output), sha256(tiny_model))[1]) == len(report["timings"])


def test_recorded_command_repeats_the_benchmark(
    opened: Callable[..., list[Path]], run_command: Any, tmp_path: Path
) -> None:
    a, b = opened(a=PlantedBackend(), b=PlantedBackend())
    first = benchmark(a, compare=(b,), samples=2, batch=2, threads=1)
    assert first.command == (
        f"python -m runtime.benchmark --model {a} --compare {b} --samples 2 --batch 2 --device auto --threads 1"
    )
    run_command(benchmark, *first.command.split()[3:], "--output", tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["command"] == first.command


def test_benchmark_of_pair_times_video_encoding(opened: Callable[..., list[Path]]) -> None:
    (path,) = opened(pair=PlantedPair(PlantedBackend()))
    report = benchmark(path, samples=4, batch=3).to_dict()
    encode = {("one query", "host", "encode a video"): [1]}
    assert measured(report) == {**WHOLE, **encode, ("query length", "host", "network"): [1, 2, 4, 6]}
    assert "encode" in report["phases"][0]["ms"]
    assert report["models"][0]["kind"] == "pair"


def test_models_are_interleaved_and_compared_with_the_first(opened: Callable[..., list[Path]]) -> None:
    log: list[str] = []
    paths = opened(**{name: PlantedBackend(before=lambda batch, name=name: log.append(name)) for name in "abc"})
    report = benchmark(compare=tuple(paths), samples=6, batch=1)
    assert [model.label for model in report.models] == ["a.onnx", "b.onnx", "c.onnx"]
    assert [agreement.different for agreement in report.agreements] == [0, 0]
    # In each round every model runs once before any of them runs again.
    assert "abcbcacababcbcacab" in "".join(log)
    for timing in report.timings:
        assert (timing.speedup is None) is (timing.model == "a.onnx")
        if timing.speedup:
            assert timing.speedup.rounds == 6
            assert timing.speedup.low <= timing.speedup.median <= timing.speedup.high
    assert "speedup" in report.text()


def test_benchmark_reports_models_with_different_answers(
    opened: Callable[..., list[Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    def shift(heads: Heads) -> None:
        heads.boundary_distances[...] += 3

    a, b = opened(a=PlantedBackend(), b=PlantedBackend(after=shift))
    report = benchmark(a, compare=(b,), samples=3, batch=1)
    (actual,) = report.agreements
    assert actual.different > 10
    assert actual.iou_min < 0.9
    assert actual.shift_max_s > 0.1
    assert "and a.onnx return different moments" in capsys.readouterr().out
    assert report.models[0].sha256 != report.models[1].sha256


def test_models_with_different_inputs_are_rejected(opened: Callable[..., list[Path]]) -> None:
    a, b = opened(a=PlantedBackend(), b=PlantedBackend(dim=16))
    with raises(ModelFileError, "models_differ", "a.onnx", 8, "b.onnx", 16):
        benchmark(a, compare=(b,), samples=1)
    manifest = PlantedBackend().manifest
    foreign = dataclasses.replace(manifest, vocabulary=Vocabulary({"zebra": 1}))
    with raises(QueryError, "models_differ", "--data"):
        synthetic_workload([manifest, foreign])


class OnGpu:
    """A backend that reports a GPU time of 0.25 ms per query."""

    device = "cuda"

    def __init__(self, inner: Any) -> None:
        self.inner, self.manifest = inner, inner.manifest
        self.timed: list[bool] = []
        self.gpu_ms = 0.0

    def run(self, batch: Batch) -> Heads:
        self.gpu_ms = 0.25 * len(batch) if self.timed and self.timed[-1] else 0.0
        return self.inner.run(batch)

    def time_gpu(self, on: bool) -> None:
        self.timed.append(on)

    def memory_report(self) -> Any:
        return SimpleNamespace(plan=10, device=20, pinned=30, free=1, total=2)


def test_gpu_time_comes_from_device_events(opened: Callable[..., list[Path]]) -> None:
    backend = OnGpu(PlantedBackend())
    (path,) = opened(gpu=backend)
    report = benchmark(path, samples=3, batch=2)
    on_gpu = {
        (timing.case.group, timing.case.size): timing.latency
        for timing in report.timings
        if timing.case.boundary == "gpu"
    }
    assert set(on_gpu) == {("one query", 1), ("batch size", 1), ("batch size", 2)}
    assert {key[1]: latency.max_ms for key, latency in on_gpu.items() if latency} == pytest.approx({1: 0.25, 2: 0.5})
    # The option is off again for later calls.
    assert backend.timed == [True, False, True, False]
    memory = report.models[0].memory
    assert (memory.plan, memory.device, memory.pinned) == (10, 20, 30)
    assert not any("no times of the GPU" in note for note in report.notes)


def test_unsupported_cases_are_skipped_with_a_note(opened: Callable[..., list[Path]]) -> None:
    def accept_short(batch: Batch) -> None:
        if batch.query_length.max() > 5:
            raise ShapeError("The query has 6 tokens and this engine takes 1 to 5.")

    backend = PlantedBackend(before=accept_short)
    (path,) = opened(short=backend)
    workload = synthetic_workload([dataclasses.replace(backend.manifest, max_query_length=5)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "synthetic_workload", lambda *_: workload)
        report = benchmark(path, samples=2, batch=1)
    failed = [timing for timing in report.timings if timing.latency is None]
    assert [(timing.case.group, timing.case.size) for timing in failed] == [("query length", 6)]
    assert failed[0].failed.startswith("The query has 6 tokens")
    assert len(report.phases) == 1


@pytest.mark.parametrize("fails_after", [2, 6])
def test_out_of_memory_skips_only_its_case(opened: Callable[..., list[Path]], fails_after: int) -> None:
    def fail(batch: Batch) -> None:
        if len(batch) == 2 and sum(len(run) == 2 for run in backend.batches) > fails_after:
            raise DeviceMemoryError("The cuda device has no memory left for this batch.")

    backend = PlantedBackend(before=fail)
    (path,) = opened(full=backend)
    report = benchmark(path, samples=5, batch=2)
    sizes_measured = {(t.case.group, t.case.boundary, t.case.size) for t in report.timings if t.latency}
    assert {("batch size", "host", 1), ("queries per video", "end to end", 1)} <= sizes_measured
    assert [phases.queries for phases in report.phases] == [1]
    message = " ".join([*report.notes, *(timing.failed for timing in report.timings)])
    assert quotes(message, 2, "no memory left")


@pytest.mark.parametrize("after", [0, 5, 150])
def test_ctrl_c_keeps_measured_timings(
    opened: Callable[..., list[Path]], tmp_path: Path, after: int, run_command: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def interrupt(batch: Batch) -> None:
        if len(backend.batches) == after + 1:
            raise KeyboardInterrupt

    backend = PlantedBackend(before=interrupt)
    (path,) = opened(stopped=backend)
    output = tmp_path / "r.json"
    run_command(benchmark, "--model", path, "--samples", 120, "--batch", 1, "--output", output, code=130)
    assert "Next:" not in caplog.text
    report = json.loads(output.read_text())
    assert report["interrupted"] is True
    assert report["notes"][0].startswith("The run was interrupted")
    samples = [timing["latency"]["samples"] for timing in report["timings"]]
    # Nothing is measured while the model opens; later, all cases except the last are complete.
    assert bool(samples) is (after > 5)
    assert samples[:-1] == [120] * len(samples[:-1])
    assert all(0 < count <= 120 for count in samples)
    assert report["phases"] == []


def test_invalid_input_is_rejected_before_loading_the_model(
    tiny_model: Path, mini: Path, tmp_path: Path, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Grounder, "load", lambda *_: pytest.fail("a model was opened"))
    model = ("--model", tiny_model)
    content = tiny_model.read_bytes()
    none = tmp_path / "none.onnx"
    wrong: list[tuple[tuple[Any, ...], str, list[object]]] = [
        ((), "missing_option", ["--model FILE"]),
        ((*model, "--samples", 0), "invalid_option", ["--samples", 0]),
        ((*model, "--batch", 0), "invalid_option", ["--batch", 4096, 0]),
        ((*model, "--batch", 10**9), "invalid_option", ["--batch", 4096, 10**9]),
        ((*model, "--threads", 0), "invalid_option", ["--threads", 0]),
        (("--model", none), "missing_file", [none]),
        ((*model, "--compare", none), "missing_file", [none]),
        ((*model, "--output", tmp_path), "output_is_directory", [tmp_path]),
        ((*model, "--output", tiny_model), "not_a_report", [tiny_model]),
        ((*model, "--plot", tmp_path / "a", "--output", tmp_path / "a"), "output_exists", [tmp_path / "a"]),
        ((*model, "--plot", tmp_path / "a.jpg"), "wrong_suffix", [tmp_path / "a.jpg", ".png"]),
        ((*model, "--video", "A"), "missing_option", ["--video", "--data DIR"]),
        ((*model, "--data", mini, "--query", "x"), "missing_option", ["--query", "--video NAME"]),
        ((*model, "--data", tmp_path / "none"), "missing_file", [tmp_path / "none"]),
        ((*model, "--data", mini, "--video", "none"), "unlisted_video", ["--video", "'none'"]),
    ]
    for arguments, code, values in wrong:
        check_error(refused(benchmark, *arguments), code, *values)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    check_error(refused(benchmark, *model, "--plot", tmp_path / "a.png"), "missing_library", "pip install '.[plot]'")
    assert tiny_model.read_bytes() == content


def test_benchmark_of_data_set_warns_once_of_repeated_query(
    tiny_model: Path, mini: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    video, sentence = dataset_workload(mini, None, ()).pairs[0]
    options: dict[str, Any] = {"samples": 5, "batch": 1, "threads": 1}
    report = benchmark(tiny_model, data=mini, video=video.name, query=(f"{sentence} xyzzy",), **options)
    assert report.inputs["made_up"] is False
    assert str(mini) in capsys.readouterr().out
    assert len(records(caplog, logging.WARNING, "'xyzzy'")) == 1
