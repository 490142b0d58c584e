"""Test the leg `tensorrt` on doubles: every step runs, and its result is recorded."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.acceptance import engines, leg_tensorrt, run_config, targets
from benchmarks.acceptance.engines import unrolled_tokens
from benchmarks.acceptance.fake_gpu import SEPARATE, stood_in
from benchmarks.acceptance.run_config import Job, questions
from benchmarks.acceptance.step_log import Found, Leg, gather, read_leg
from runtime.artifacts.engine_layers import layers_path
from runtime.artifacts.engine_metadata import metadata_path, read_verified, with_digest
from runtime.backends.tensorrt_backend import TensorRTPair
from runtime.core.batch import Heads
from runtime.core.errors import CheckFailed
from runtime.core.io.atomic_files import write_json
from runtime.core.io.digests import sha256
from tests.raising import quotes
from tests.train.training.narrow import narrow_backbone

__all__ = ["narrow_backbone"]


@pytest.fixture(scope="module")
def ran(split_models: Path, planted: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    """The leg as it ran on a GPU and a library that are doubles, without the steps in processes of their own."""
    job = Job(tmp_path_factory.mktemp("found"), "cuda", small=True)
    job.checkpoint.parent.symlink_to(split_models)
    job.data.symlink_to(planted)
    with pytest.MonkeyPatch.context() as monkeypatch, stood_in(job):
        monkeypatch.setattr(run_config, "SMALL", dataclasses.replace(run_config.SMALL, samples=4, seconds=0.01))
        for name, runs in {"PHASE_RUNS": 4, "WARM_UP_RUNS": 1, "PROFILED_RUNS": 2}.items():
            monkeypatch.setattr(leg_tensorrt, name, runs)
        for name in SEPARATE:
            monkeypatch.setattr(leg_tensorrt, name, lambda *_: Found("It was."))
        leg = Leg(job.results("tensorrt"), "tensorrt", {"settings": job.settings(), "command": ""})
        leg_tensorrt.run(job, leg)
        leg.end("finished")
        yield job


def read_step(job: Job, name: str) -> dict[str, Any]:
    (step,) = [step for step in read_leg(job.results("tensorrt"))["steps"] if step["name"] == name]
    return step


def test_tensorrt_leg_runs_all_steps_in_order(ran: Job) -> None:
    steps = {step["name"]: step for step in read_leg(ran.results("tensorrt"))["steps"]}
    bad = {name: step["told"] for name, step in steps.items() if step["outcome"] in ("failed", "broken")}
    assert bad == {}
    skipped = {name for name, step in steps.items() if step["outcome"] == "skipped"}
    # Weights of TensorRT 8.6, which the double is of, do not have the type of the graph.
    without = {"tensorrt, int8 without stored weights, pair", "the bar, int8 without stored weights"}
    assert skipped == {"tensorrt-rtx", "rejected engines", *without}
    # What a machine is rented for comes before what merely stands beside.
    names = list(steps)
    assert names.index("the bar") < names.index("where the time goes: layers") < names.index("tensorrt, fp32, pair")
    assert {f"tensorrt, {p}, pair, answers" for p in leg_tensorrt.PRECISIONS} <= steps.keys()
    assert ("drn.int8.query.6.engine" in steps["tensorrt, int8, pair"]["told"]) == (6 in unrolled_tokens(ran))
    assert "99.1.0.1" in steps["fault: an engine of another version"]["told"]


def test_report_lists_every_target_with_verdict(ran: Job) -> None:
    _, report = gather(ran.output, ("tensorrt",), {}, "stand-in")
    text = report.read_text()
    rows = [line.strip("| ").split(" | ") for line in text.partition("## The bar")[2].splitlines() if " | " in line]
    actual = {row[0]: row[-1] for row in rows[: len(targets.BARS) + 2] if row[0] != targets.HEADER[0]}
    # Called an H100, which takes 3 ms for the network and is made of a CPU of any speed.
    assert actual.pop(targets.GPU_PART) == "MISSED"
    assert actual.pop(targets.DELIVERY) == actual.pop(targets.NARROW) == "not measured"
    assert set(actual) == {"---", *targets.BARS} - {targets.GPU_PART, targets.DELIVERY, targets.NARROW}
    assert set(actual.values()) <= {"---", "met", "MISSED"}
    for title in (
        "### the bar",
        "### the bar: torch.compile",
        "### phases",
        "### layers, batch 1",
        "### layers, batch 4",
    ):
        assert f"{title}\n" in text


def test_both_lstm_forms_are_timed_at_engine_query_lengths(ran: Job) -> None:
    step = read_step(ran, "the LSTM as a loop and written out")
    steps = unrolled_tokens(ran)
    assert steps
    assert {(entry["case"], entry["queries"]) for entry in step["values"]["timings"]} == {
        (f"{form}, {tokens} tokens", size)
        for form in ("loop", "written out")
        for tokens in steps
        for size in (1, ran.sizes.batches[-1])
    }
    # By the driver's clock, which takes both for alike.
    assert {round(entry["p50_ms"], 6) for entry in step["values"]["timings"]} == {3.0}
    # TensorRT 8.6, which the double is of, captures no loop.
    assert step["values"]["captured"] == {"loop": "no", "written out": "yes"}


def test_lstm_forms_agree_and_query_each_video_once(ran: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    ask, numbers = TensorRTPair.ask, []
    known = questions(ran, 24)
    two = [known[0], next(pair for pair in known if pair[0] is not known[0][0])]

    def spoilt(pair: Any, tokens: Any, lengths: Any, videos: Any, index: Any) -> Heads:
        numbers.append((len({video.key for video in videos}), len(videos)))
        heads = ask(pair, tokens, lengths, videos, index)
        # What is not a number is no agreement, whichever head it is in.
        if len(pair._active_plans) > 1:
            heads.iou_logits[...] = np.nan
        return heads

    monkeypatch.setattr(TensorRTPair, "ask", spoilt)
    monkeypatch.setattr(
        leg_tensorrt, "questions", lambda job, count: list(itertools.islice(itertools.cycle(two), count))
    )
    actual = leg_tensorrt._lstm_forms(ran, ran.output / "tensorrt" / "drn.fp16.query.engine")
    assert len(actual.broken) == 2 * len(unrolled_tokens(ran))
    assert quotes(actual.broken[0], "nan")
    assert set(numbers) == {(1, 1), (2, 2)}


def test_baseline_of_a_target_is_the_fastest_full_network() -> None:
    ratios = {
        "eager PyTorch, FP32, features from the host": 25.0,
        "CUDA graphs, FP32": 4.0,
        "CUDA graphs, FP16": 3.0,
        "CUDA graphs, FP16, encoded videos": 1.5,
        "torch.compile, FP16": 5.0,
        "torch.compile, FP32": 6.0,
    }
    assert targets.fastest(ratios) == {targets.EAGER: 25.0, targets.GRAPHS: 3.0, targets.COMPILED: 5.0}


def test_baseline_from_another_run_is_marked() -> None:
    def leg(*steps: Mapping[str, Any]) -> dict[str, Any]:
        return {"steps": [{"values": values} for values in steps]}

    def timing(case: str, p50: float, boundary: str = "end to end", queries: int = 1) -> dict[str, Any]:
        return {"case": case, "p50_ms": p50, "boundary": boundary, "queries": queries}

    torch = leg(
        {"timings": [timing("eager PyTorch, FP32", 5.0), timing("eager PyTorch, FP16", 4.0)]},
        {"timings": [timing("CUDA graphs, FP16", 0.3), timing("CUDA graphs, FP16, encoded videos", 0.1)]},
        {"timings": [timing("torch.compile, FP16", 0.1, "gpu"), timing("torch.compile, FP16", 9.0, queries=32)]},
    )
    engine = leg({"bars": [{"bar": targets.P50, "found": 0.2, "verdict": "met"}]})
    actual = {row[0]: row[2:] for row in targets.rows([torch, engine])}
    assert actual[targets.EAGER] == ["20.00 times as fast", "met, of two runs"]
    assert actual[targets.GRAPHS] == ["1.50 times as fast", "MISSED, of two runs"]
    assert actual[targets.COMPILED] == ["", "not measured"]
    # Where both took turns, that counts.
    beside = leg({"bars": [{"bar": targets.EAGER, "found": 25.0, "verdict": "met"}]})
    assert {row[0]: row[3] for row in targets.rows([torch, engine, beside])}[targets.EAGER] == "met"
    assert targets.of_two_runs([torch]) == targets.of_two_runs([engine]) == {}


def test_target_values_come_from_recorded_timings(ran: Job) -> None:
    values = read_step(ran, "the bar")["values"]
    timings = {entry["case"]: entry for entry in values["timings"] if "times as fast" in entry}
    assert {"CUDA graphs, FP32", "CUDA graphs, FP32, encoded videos"} < timings.keys()
    (bar,) = [entry for entry in values["bars"] if entry["bar"] == targets.GRAPHS]
    assert bar["found"] == timings["CUDA graphs, FP32"]["times as fast"]["median"]
    # Text in and moments out takes longer than what of it the GPU has.
    actual = {entry["bar"]: entry["found"] for entry in values["bars"]}
    assert actual[targets.GPU_PART] == pytest.approx(3.0)
    rates = {entry["queries"]: entry["queries_per_s"] for entry in values["timings"] if entry["boundary"] != "gpu"}
    max_queries = leg_tensorrt.BULK_BATCHES * ran.sizes.batches[-1]
    assert rates.keys() == {1, ran.sizes.batches[-1], max_queries}
    assert actual[targets.RATE] == rates[max_queries]


def test_rejected_engines_are_timed_and_their_layers_listed(ran: Job, tmp_path: Path) -> None:
    job = dataclasses.replace(ran, output=tmp_path)
    folder = tmp_path / "tensorrt"
    folder.mkdir()
    # As `export.engine.engine_writer.mark_rejected` names them; the built ones are not there.
    source = ran.output / "tensorrt" / "drn.fp16.video.engine"
    plan = folder / "drn.fp16.video.rejected.engine"
    plan.write_bytes(source.read_bytes())
    content = dict(read_verified(source))
    content["sha256"] = {plan.name: sha256(plan)}
    content["census"] = {**content["census"], "verdict": "contradicted", "reason": "30 layers compute in fp32"}
    write_json(metadata_path(plan), with_digest(content))
    layers_path(plan).write_bytes(layers_path(source).read_bytes())
    listed = engines.layers_step(job, "tensorrt", "fp16")
    assert listed.values["plans"] == {plan.name: {"verdict": "contradicted", "layers": layers_path(plan).name}}
    timed = engines.time_rejected(job, "tensorrt")
    assert list(timed.broken) == []
    assert [entry["case"] for entry in timed.values["timings"]] == [plan.name]
    assert engines.built_engine(folder / "drn.fp16.video.engine") == plan
    layers_path(plan).write_bytes(b"damaged")
    assert engines.layers_step(job, "tensorrt", "fp16").broken


def test_lease_builds_engines_without_a_data_set(ran: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Sequence[Any]] = []
    rejecting = CheckFailed("The engine is not fp16.")

    def run(job: Job, leg: Any, module: str, *words: Any, **options: Any) -> str:
        seen.append(words)
        raise rejecting

    monkeypatch.setattr(engines, "run_module", run)
    job = dataclasses.replace(ran, order="lease")
    leg = Leg(ran.output / "other.json", "tensorrt", {})
    actual = engines.build(job, leg, "tensorrt", "fp16", True)
    # What is rejected is no obstacle to the steps that judge and time it.
    assert actual.broken == ["The engine is not fp16"]
    assert "--data" not in seen[0]
    engines.build(job, leg, "tensorrt", "int8", True)
    assert seen[1][seen[1].index("--calib-method") + 1] == "percentile"
    monkeypatch.setattr(Job, "table", ran.checkpoint)
    engines.build(job, leg, "tensorrt", "int8", True)
    assert seen[2][seen[2].index("--table") + 1] == ran.checkpoint
    assert "--data" not in seen[2]


def test_int8_without_stored_weights_is_another_engine(ran: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx

    from export.build.reduced_precision import validate_keep_modules

    seen: list[Sequence[Any]] = []

    def run(job: Job, leg: Any, module: str, *words: Any, **options: Any) -> str:
        seen.append(words)
        raise CheckFailed("The engine is not int8.")

    monkeypatch.setattr(engines, "run_module", run)
    monkeypatch.setattr(engines, "read_verified", lambda path: {"strongly_typed": True})
    engines.build_computed_only(ran, Leg(ran.output / "more.json", "tensorrt", {}), "tensorrt")
    (words,) = seen
    output = words[words.index("--output") + 1]
    assert output == engines.engine_path(ran, "tensorrt", "int8", True, engines.COMPUTED_ONLY)
    assert output != engines.engine_path(ran, "tensorrt", "int8", True)
    kept = words[words.index("--keep") + 1 :]
    assert {"qInput", "query_encoder.embedding"} <= set(kept)
    validate_keep_modules(onnx.load(ran.graph), "int8", kept)


def test_gpu_tests_lists_every_file_with_gpu_marks() -> None:
    tests = Path(__file__).parents[2]
    marks = tuple(f"@pytest.mark.{mark}\n" for mark in ("gpu", "trt"))
    marked = {path for path in tests.rglob("test_*.py") if any(mark in path.read_text("utf-8") for mark in marks)}
    assert marked == set(leg_tensorrt.GPU_TESTS)
