"""Test `benchmarks.gpu` in rehearsals: every step is recorded, and errors are never reported as passed."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from benchmarks import gpu
from benchmarks.acceptance import run_config as acceptance
from benchmarks.acceptance import targets
from benchmarks.acceptance.leg_tensorrt import GPU_TESTS
from benchmarks.acceptance.run_config import Job
from benchmarks.acceptance.step_log import Found, Leg, OutOfTime, Skip, kept, markdown, read_leg, record_crash, verdict
from runtime.core.errors import CheckFailed, GroundingError, ModelFileError
from tests.forked_commands import ForkedCommand, hide_modules, use_narrow_backbone
from tests.raising import quotes, raises
from tests.train.training.narrow import with_narrow_backbone

# Takes a minute, and says so when it gets Ctrl-C.
SLOW = (
    "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('kept')\n    raise SystemExit(130)\n"
)
SETTINGS = {"settings": {"device": "cpu", "small": True}}


def outcomes(path: Path) -> dict[str, str]:
    return {step["name"]: step["outcome"] for step in read_leg(path)["steps"]}


def raising(error: BaseException) -> Callable[[], Found]:
    def step() -> Found:
        raise error

    return step


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """Exit code and output of the legs `prepare` and `torch` in this process, tiny and on the CPU.

    The commands that they start are forked, and networks have a narrow backbone.
    """
    pytest.importorskip("onnxscript", reason="the rehearsal exports a network")
    leg_torch = pytest.importorskip("benchmarks.acceptance.leg_torch", reason="the rehearsal trains a network")
    output = tmp_path_factory.mktemp("gpu") / "found"

    def forked(line: list[str], *, env: Mapping[str, str] = os.environ, timeout: float = 120, **_: Any) -> Any:
        return ForkedCommand(["python", *line[1:]], env, prepare=use_narrow_backbone).finish(timeout)

    def run_module(job: Job, leg: Leg, *words: object, **_: Any) -> str:
        result = forked([sys.executable, "-m", *map(str, words)])
        assert result.returncode == 0, result.stderr
        return result.stdout

    def run_leg(job: Job, name: str, limit: float, *_: Any) -> None:
        gpu.run_inside(job, name, limit)

    replaced = SimpleNamespace(run=forked, TimeoutExpired=subprocess.TimeoutExpired)
    small = dataclasses.replace(acceptance.SMALL, samples=3, seconds=0.01)
    with pytest.MonkeyPatch.context() as patch, with_narrow_backbone():
        patch.setattr(acceptance, "subprocess", replaced)
        patch.setattr(acceptance, "SMALL", small)
        patch.setattr(leg_torch, "run_module", run_module)
        patch.setattr(gpu, "_run_leg", run_leg)
        return gpu.main(["prepare", "torch", "--output", str(output), "--device", "cpu", "--small"]), output


def test_cpu_rehearsal_passes_and_skips_gpu_steps(rehearsed: tuple[int, Path]) -> None:
    code, output = rehearsed
    steps = {step["name"]: step for step in read_leg(output / "torch.json")["steps"]}
    actual = outcomes(output / "torch.json")
    assert code == 0, steps
    assert actual["losses, fp32"] == actual["answers, TF32 off"] == actual["fault: threads"] == "kept"
    assert actual["fault: GPU absent"] == actual["speed"] == "kept"
    # A CPU cannot rehearse a GPU's faults, and a skipped step is not a success.
    assert actual["fault: fork"] == actual["fault: out of memory"] == actual["speed, torch.compile"] == "skipped"
    reasons = [step["told"] for step in steps.values() if step["outcome"] == "skipped"]
    assert all(reason.endswith(".") and len(reason) > 15 for reason in reasons)


def test_cpu_rehearsal_report_is_marked_as_rehearsal(rehearsed: tuple[int, Path]) -> None:
    (report,) = rehearsed[1].glob("gpu-*-rehearsal-cpu.md")
    text = report.read_text()
    assert "**A rehearsal:" in text
    assert "| losses, fp32 | kept |" in text
    assert "| eager PyTorch, FP32 | host | 1 |" in text
    content = json.loads(report.with_suffix(".json").read_text())
    assert [leg["leg"] for leg in content["legs"]] == ["prepare", "torch"]


def test_leg_runs_in_its_own_process(tmp_path: Path) -> None:
    assert gpu.main(["cuda", "--output", str(tmp_path), "--device", "cpu", "--small"]) in (0, 2)
    # Skipped where CUDA has no driver.
    assert read_leg(tmp_path / "cuda.json")["state"] in ("skipped", "finished")


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., Leg]:
    """Return a function that opens the results of one leg, as each call of the command does."""
    return lambda settings=SETTINGS, **more: Leg(tmp_path / "torch.json", "torch", settings, **more)


def done() -> Found:
    return Found("done.")


def test_failed_step_fails_the_leg_and_later_steps_run(opened: Callable[..., Leg]) -> None:
    leg = opened()
    steps = {
        "good": (done, "kept"),
        "broken": (raising(CheckFailed("it moved.")), "broken"),
        "bug": (raising(ZeroDivisionError("division")), "failed"),
        "judged": (lambda: Found("it ran.", broken=["too slow"]), "broken"),
        "last": (done, "kept"),
    }
    for name, (step, outcome) in steps.items():
        assert leg.step(name, step) == (outcome == "kept")
        assert outcomes(leg.path)[name] == outcome
    leg.end("finished")
    assert not kept(read_leg(leg.path))
    assert "ZeroDivisionError: division" in read_leg(leg.path)["steps"][2]["told"]


def test_leg_with_only_skipped_steps_does_not_pass(opened: Callable[..., Leg]) -> None:
    leg = opened()
    leg.step("first", raising(Skip("It is not here.")))
    leg.end("finished")
    assert not kept(leg.content)
    leg.end("skipped", "No GPU.")
    assert not kept(leg.content)
    assert verdict(leg.content) == "skipped: No GPU."


def test_interrupted_leg_resumes_and_keeps_finished_steps(opened: Callable[..., Leg]) -> None:
    step, other = mock.Mock(side_effect=done), {"settings": {"device": "cuda", "small": False}}
    with pytest.raises(OutOfTime):
        opened(deadline=0.0).step("first", step)
    for settings, count in ((SETTINGS, 1), (SETTINGS, 1), (other, 2)):
        leg = opened(settings)
        leg.step("first", step)
        assert step.call_count == count
    leg.end("finished")
    opened(other).step("first", step)
    assert step.call_count == 3


def test_chosen_steps_run_once_and_others_on_next_run(opened: Callable[..., Leg]) -> None:
    step = mock.Mock(side_effect=done)
    leg = opened(chosen=["second"])
    assert not leg.step("first", step)
    assert leg.step("second", step)
    leg.end("chosen")
    assert kept(read_leg(leg.path))
    assert "chosen" in verdict(read_leg(leg.path))
    leg = opened()
    assert leg.step("first", step)
    assert leg.step("second", step)
    assert outcomes(leg.path) == {"second": "kept", "first": "kept"}
    assert step.call_count == 2


def test_crashed_process_fails_only_the_running_step(opened: Callable[..., Leg]) -> None:
    leg, step = opened(), mock.Mock()
    leg.step("first", done)
    with pytest.raises(KeyboardInterrupt):
        leg.step("second", raising(KeyboardInterrupt()))
    assert record_crash(leg.path, -11)
    leg = opened()
    assert not leg.step("second", step)
    assert leg.step("third", done)
    assert outcomes(leg.path) == {"first": "kept", "second": "failed", "third": "kept"}
    assert not record_crash(leg.path, -11)
    step.assert_not_called()


def test_step_interrupted_twice_fails_without_retry(opened: Callable[..., Leg]) -> None:
    step = mock.Mock()
    for _ in range(2):
        # As when its process is killed.
        with pytest.raises(KeyboardInterrupt):
            opened().step("hangs", raising(KeyboardInterrupt()))
    leg = opened()
    assert not leg.step("hangs", step)
    assert leg.step("next", done)
    assert outcomes(leg.path) == {"hangs": "failed", "next": "kept"}
    assert read_leg(leg.path)["steps"][0]["told"]
    step.assert_not_called()


def test_step_values_nan_and_inf_are_written_as_text(opened: Callable[..., Leg]) -> None:
    leg = opened()
    values = {"loss": float("nan"), "count": np.int64(3), "rates": (np.float32(0.5), float("inf"))}
    leg.step("losses", lambda: Found("they diverged.", values, ["they are no numbers"]))
    assert read_leg(leg.path)["steps"][0]["values"] == {"loss": "nan", "count": 3, "rates": [0.5, "inf"]}


def test_markdown_report_contains_every_table(opened: Callable[..., Leg]) -> None:
    leg = opened({**SETTINGS, "command": "benchmarks/gpu.sh torch"})
    table = (("case", "p50 ms"), [["a | b", "0.1"]])
    leg.step("speed", lambda: Found("fast.", judged=False, tables={"speed": table}))
    leg.end("finished")
    text = markdown({"name": "GPU", "date": "2026-01-01", "machine": {}, "legs": [leg.content]})
    assert "| torch | passed (1 measured) |" in text
    assert "### speed" in text
    assert "| a \\| b | 0.1 |" in text


def pretend(monkeypatch: pytest.MonkeyPatch, legs: dict[str, Callable[[Leg], Any]]) -> None:
    """Run legs in this process, and take everything as prepared."""

    def run_leg(job: Job, name: str, limit: float, environment: Any, steps: Any = ()) -> None:
        leg = Leg(job.results(name), name, {"settings": job.settings(), "command": job.command(name)})
        try:
            legs[name](leg)
        except Skip as reason:
            leg.end("skipped", str(reason))
        else:
            leg.end("finished")

    monkeypatch.setattr(gpu, "_run_leg", run_leg)
    monkeypatch.setattr(gpu, "_prepared", lambda job: True)


def good(leg: Leg) -> None:
    leg.step("answers", lambda: Found("they are the same."))


def bad(leg: Leg) -> None:
    good(leg)
    leg.step("speed", lambda: Found("it ran.", broken=["0.3 ms where 0.25 is the bar"]))


def absent(leg: Leg) -> None:
    raise Skip("onnxruntime offers no CUDA.")


@pytest.mark.parametrize(
    ("legs", "code"),
    [
        ({"torch": good, "ort-cuda": absent, "tensorrt": absent}, 0),
        ({"torch": good, "ort-cuda": bad, "tensorrt": absent}, 1),
        ({"torch": absent, "ort-cuda": absent, "tensorrt": absent}, 2),
    ],
)
def test_exit_code_is_decided_by_legs_that_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, legs: dict[str, Callable[[Leg], Any]], code: int
) -> None:
    pretend(monkeypatch, legs)
    assert gpu.main([*legs, "--output", str(tmp_path), "--device", "cpu", "--small"]) == code
    (report,) = tmp_path.glob("gpu-*.md")
    assert "skipped: onnxruntime offers no CUDA." in report.read_text()
    assert ("FAILED (" in report.read_text()) == (code == 1)


def test_report_includes_results_of_earlier_legs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {"torch": bad, "ort-cuda": good})
    assert gpu.main(["torch", "--output", str(tmp_path), "--device", "cpu", "--small"]) == 1
    assert gpu.main(["ort-cuda", "--output", str(tmp_path), "--device", "cpu", "--small"]) == 0
    (report,) = tmp_path.glob("gpu-*.json")
    assert [leg["leg"] for leg in json.loads(report.read_text())["legs"]] == ["torch", "ort-cuda"]


def test_leg_is_skipped_when_inputs_cannot_be_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(leg: Leg) -> None:
        leg.step("network", raising(ModelFileError("The training diverged.")))

    pretend(monkeypatch, {"prepare": failing})
    monkeypatch.setattr(gpu, "_prepared", lambda job: False)
    assert gpu.main(["torch", "--output", str(tmp_path), "--device", "cpu", "--small"]) == 1
    assert read_leg(tmp_path / "torch.json")["state"] == "skipped"


def test_chosen_steps_run_without_preparing_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def take(leg: Leg) -> None:
        ran.append(leg.content["leg"])
        leg.step("builder", lambda: Found("it was made."))

    pretend(monkeypatch, {"prepare": take, "tensorrt": take})
    monkeypatch.setattr(gpu, "_prepared", lambda job: False)
    words = ["tensorrt", "--output", str(tmp_path), "--device", "cpu", "--small", "--step"]
    assert gpu.main([*words, "builder"]) == 0
    assert ran == ["tensorrt"]
    # In the background `prepare` may be under way.
    assert gpu.main([*words, "builder", "the bar"]) == 2
    assert ran == ["tensorrt"]
    assert read_leg(tmp_path / "tensorrt.json")["state"] == "skipped"
    assert gpu.main(["cuda", "tensorrt", *words[1:], "builder"]) == 2


@pytest.mark.parametrize(
    ("words", "change", "values"),
    [
        ((), ("NEEDED", ("numpy", "no_such_package")), ["no_such_package"]),
        (("torch",), ("cuda_gpu", lambda: None), ["CUDA", "GPU"]),
        (("onnx",), (), ["onnx", "prepare, cuda, torch, ort-cuda, tensorrt"]),
    ],
    ids=["missing package", "missing GPU", "unknown leg"],
)
def test_impossible_run_exits_2_without_output(
    words: tuple[str, ...],
    change: tuple[Any, ...],
    values: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if change:
        monkeypatch.setattr(gpu, *change)
    assert gpu.main([*words, "--output", str(tmp_path / "found")]) == 2
    assert quotes(capsys.readouterr().err, *values)
    assert not (tmp_path / "found").exists()


def test_checkout_without_install_registers_torch_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.importlib.metadata, "distributions", lambda: ())
    environment = gpu._environment(Job(tmp_path, "cpu", small=True))
    code = "import importlib.metadata as m; print(*[e.value for e in m.entry_points(group='drn.backends')])"
    # Isolated from what is installed, so that only what was written tells.
    directory = environment["PYTHONPATH"].split(os.pathsep)[1]
    words = [
        sys.executable,
        "-S",
        "-c",
        f"import sys; sys.path = [p for p in sys.path if 'site-packages' not in p]; {code}",
    ]
    result = subprocess.run(
        words, capture_output=True, text=True, env={**environment, "PYTHONPATH": directory}, check=True
    )
    assert result.stdout.split() == ["train.backend:open_checkpoint"]


def test_latency_targets_apply_only_to_their_gpu_class() -> None:
    slow = {targets.P50: 0.5, targets.P99: 0.9, targets.GPU_PART: 0.3, targets.RATE: 10_000.0}
    ratios = {targets.EAGER: 25.0, targets.GRAPHS: 1.5}
    on_another = targets.held("Tesla T4", slow | ratios)
    assert targets.missed(on_another) == [
        f"{targets.GRAPHS}: 1.50 times as fast where at least 2 times as fast is the bar"
    ]
    assert {entry["verdict"] for entry in on_another if entry["bar"] in slow} == {"not judged"}
    assert len(targets.missed(targets.held("NVIDIA H200", slow | ratios))) == 5
    # What is just reached is met.
    limits = {name: bar.limit for name, bar in targets.BARS.items()}
    assert {entry["verdict"] for entry in targets.held("NVIDIA H200", limits)} == {"met"}


@pytest.mark.parametrize("value", [None, float("nan")])
def test_unmeasured_value_misses_the_target(value: float | None, opened: Callable[..., Leg]) -> None:
    entries = targets.held("NVIDIA H200", dict.fromkeys(targets.BARS, value))
    assert {entry["verdict"] for entry in entries} == {"MISSED"}
    assert len(targets.missed(entries)) == len(targets.BARS)
    # Also once it is read from the file again.
    leg = opened()
    leg.step("the bar", lambda: Found("It was.", {"bars": entries}))
    assert {row[-1] for row in targets.rows([read_leg(leg.path)])} == {"MISSED"}


@pytest.mark.usefixtures("default_signals")
def test_failed_check_of_a_command_is_reported_verbatim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leg, job = Leg(tmp_path / "torch.json", "torch", SETTINGS), Job(tmp_path, "cpu", small=True)
    module = tmp_path / "breaks.py"
    monkeypatch.setattr(acceptance, "ROOT", tmp_path)
    module.write_text("import sys\nprint('error: it moved.')\nsys.exit(1)\n")
    with raises(CheckFailed, "check_failed", "it moved"):
        acceptance.run_module(job, leg, "breaks")
    module.write_text(SLOW)
    with raises(GroundingError, "out_of_time", "python -m breaks"):
        acceptance.run_module(job, leg, "breaks", max_seconds=1)


@pytest.mark.usefixtures("default_signals")
def test_command_out_of_time_is_retried_not_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, job = tmp_path / "torch.json", Job(tmp_path, "cuda", small=True)
    faults = tmp_path / "benchmarks" / "acceptance" / "fault_injection.py"
    faults.parent.mkdir(parents=True)
    for file in (tmp_path / "slow.py", faults):
        file.write_text(SLOW)
    for package in (faults.parent, faults.parents[1]):
        (package / "__init__.py").touch()
    monkeypatch.setattr(acceptance, "ROOT", tmp_path)
    late: list[Callable[[Leg], Any]] = [
        lambda leg: acceptance.run_module(job, leg, "slow", max_seconds=100),
        lambda leg: acceptance.run_module(job, leg, "slow", max_seconds=100, ok=(0, 130)),
        lambda leg: acceptance.fault(job, leg, "fork", tmp_path / "drn.pt"),
    ]
    for start in late:
        leg = Leg(path, "torch", SETTINGS, deadline=time.time() + 1)
        with pytest.raises(OutOfTime):
            leg.step("late", functools.partial(start, leg))
        assert read_leg(path)["steps"] == []
    # Half of its time is enough for a command whose results so far are usable.
    leg = Leg(path, "torch", SETTINGS, deadline=time.time() + 6.5)
    assert "kept" in acceptance.run_module(job, leg, "slow", max_seconds=2, ok=(0, 130))


def test_background_leg_interrupts_its_commands_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What a shell starts in the background ignores Ctrl-C, and so would what it starts.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)

    def run(job: Job, leg: Leg) -> None:
        (tmp_path / "slow.py").write_text(SLOW)
        printed.append(acceptance.run_module(job, leg, "slow", max_seconds=1.5, ok=(130,)))

    printed: list[str] = []
    monkeypatch.setattr(acceptance, "ROOT", tmp_path)
    monkeypatch.setattr("benchmarks.acceptance.leg_onnxruntime.run", run)
    try:
        gpu.run_inside(Job(tmp_path, "cpu", small=True), "ort-cuda", 60.0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert printed[0].splitlines()[-1] == "kept"


def test_gpu_tests_are_collected_without_optional_packages() -> None:
    absent = (
        "av", "fastapi", "starlette", "uvicorn", "multipart", "prometheus_client", "ray", "pyarrow", "tritonclient",
        "polygraphy", "schemathesis", "playwright", "tensorrt", "tensorrt_rtx", "h5py",
    )  # fmt: skip
    words = ["python", "-m", "pytest", "--collect-only", "-q", "-m", "gpu or trt", "-p", "no:cacheprovider"]
    words += map(str, GPU_TESTS)
    # One of the absent ones has a plugin for pytest.
    alone = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    actual = ForkedCommand(words, alone, prepare=functools.partial(hide_modules, absent)).finish()
    assert actual.returncode == 0, actual.stdout[-2000:] + actual.stderr
    assert "test_tensorrt_backend.py" in actual.stdout
