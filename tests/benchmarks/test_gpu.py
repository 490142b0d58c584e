"""Test `benchmarks.gpu` in rehearsals: every step is recorded, and errors are never reported as passed."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import gpu
from benchmarks.acceptance import run_config as acceptance
from benchmarks.acceptance import targets
from benchmarks.acceptance.run_config import Job
from benchmarks.acceptance.step_log import Found, Leg, OutOfTime, Skip, kept, markdown, read_leg, record_crash, verdict
from runtime.core.errors import CheckFailed, GroundingError, ModelFileError
from tests.forked_commands import ForkedCommand, hide_modules
from tests.raising import quotes, raises

ROOT = Path(__file__).parents[2]
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
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """The command as it is typed, with everything tiny, on the CPU."""
    pytest.importorskip("torch", reason="the rehearsal trains a network")
    pytest.importorskip("onnxscript", reason="the rehearsal exports a network")
    output = tmp_path_factory.mktemp("gpu") / "found"
    words = [ROOT / "benchmarks" / "gpu.sh", "prepare", "torch", "--output", output, "--device", "cpu", "--small"]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, capture_output=True, text=True, env=environment, cwd=output.parent), output


def test_cpu_rehearsal_passes_and_skips_gpu_steps(rehearsed: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    result, output = rehearsed
    assert result.returncode == 0, result.stderr
    actual = outcomes(output / "torch.json")
    assert actual["losses, fp32"] == actual["answers, TF32 off"] == actual["fault: threads"] == "kept"
    assert actual["fault: GPU absent"] == actual["speed"] == "kept"
    # A rehearsal of a GPU's faults cannot be had, and is not called a success.
    assert actual["fault: fork"] == actual["fault: out of memory"] == actual["speed, torch.compile"] == "skipped"


def test_skipped_steps_record_a_reason(rehearsed: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    steps = read_leg(rehearsed[1] / "torch.json")["steps"]
    reasons = [step["told"] for step in steps if step["outcome"] == "skipped"]
    assert reasons
    assert all(reason.endswith(".") and len(reason) > 15 for reason in reasons)


def test_cpu_rehearsal_report_is_marked_as_rehearsal(rehearsed: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    (report,) = rehearsed[1].glob("gpu-*-rehearsal-cpu.md")
    text = report.read_text()
    assert "**A rehearsal:" in text
    assert "| losses, fp32 | kept |" in text
    assert "| eager PyTorch, FP32 | host | 1 |" in text
    whole = json.loads(report.with_suffix(".json").read_text())
    assert [leg["leg"] for leg in whole["legs"]] == ["prepare", "torch"]


def test_failed_step_fails_the_leg_and_later_steps_run(tmp_path: Path) -> None:
    leg = Leg(tmp_path / "torch.json", "torch", SETTINGS)
    assert leg.step("good", lambda: Found("all is well."))
    for name, error in {"broken": CheckFailed("it moved."), "bug": ZeroDivisionError("division")}.items():
        before = read_leg(tmp_path / "torch.json")["steps"]
        assert not leg.step(name, raising(error))
        assert read_leg(tmp_path / "torch.json")["steps"][:-1] == before
    assert not leg.step("judged", lambda: Found("it ran.", broken=["too slow"]))
    assert leg.step("last", lambda: Found("well again."))
    leg.end("finished")
    expected = {"good": "kept", "broken": "broken", "bug": "failed", "judged": "broken", "last": "kept"}
    assert outcomes(tmp_path / "torch.json") == expected
    assert not kept(read_leg(tmp_path / "torch.json"))
    assert "ZeroDivisionError: division" in read_leg(tmp_path / "torch.json")["steps"][2]["told"]


def test_leg_with_only_skipped_steps_does_not_pass(tmp_path: Path) -> None:
    leg = Leg(tmp_path / "torch.json", "torch", SETTINGS)
    leg.step("first", raising(Skip("It is not here.")))
    leg.end("finished")
    assert not kept(leg.content)
    leg.end("skipped", "No GPU.")
    assert not kept(leg.content)
    assert verdict(leg.content) == "skipped: No GPU."


def test_interrupted_leg_resumes_and_keeps_finished_steps(tmp_path: Path) -> None:
    path, calls = tmp_path / "torch.json", []

    def counted() -> Found:
        calls.append(1)
        return Found("done.")

    late = Leg(path, "torch", SETTINGS, deadline=0.0)
    with pytest.raises(OutOfTime):
        late.step("first", counted)
    Leg(path, "torch", SETTINGS).step("first", counted)
    Leg(path, "torch", SETTINGS).step("first", counted)
    assert len(calls) == 1
    # What another run found says nothing of this one.
    Leg(path, "torch", {"settings": {"device": "cuda", "small": False}}).step("first", counted)
    assert len(calls) == 2
    leg = Leg(path, "torch", {"settings": {"device": "cuda", "small": False}})
    leg.end("finished")
    Leg(path, "torch", {"settings": {"device": "cuda", "small": False}}).step("first", counted)
    assert len(calls) == 3


def test_crashed_process_fails_only_the_running_step(tmp_path: Path) -> None:
    path = tmp_path / "torch.json"
    leg = Leg(path, "torch", SETTINGS)
    leg.step("first", lambda: Found("done."))
    with pytest.raises(KeyboardInterrupt):
        leg.step("second", raising(KeyboardInterrupt()))
    assert record_crash(path, -11)
    leg = Leg(path, "torch", SETTINGS)
    assert not leg.step("second", lambda: pytest.fail("it was taken again"))
    assert leg.step("third", lambda: Found("done."))
    assert outcomes(path) == {"first": "kept", "second": "failed", "third": "kept"}
    assert not record_crash(path, -11)


def test_step_values_nan_and_inf_are_written_as_text(tmp_path: Path) -> None:
    leg = Leg(tmp_path / "torch.json", "torch", SETTINGS)
    values = {"loss": float("nan"), "count": np.int64(3), "rates": (np.float32(0.5), float("inf"))}
    leg.step("losses", lambda: Found("they diverged.", values, ["they are no numbers"]))
    assert read_leg(leg.path)["steps"][0]["values"] == {"loss": "nan", "count": 3, "rates": [0.5, "inf"]}


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


def test_chosen_steps_run_once_and_others_on_next_run(tmp_path: Path) -> None:
    path, calls = tmp_path / "torch.json", []

    def counted() -> Found:
        calls.append(1)
        return Found("done.")

    leg = Leg(path, "torch", SETTINGS, chosen=["second"])
    assert not leg.step("first", counted)
    assert leg.step("second", counted)
    leg.end("chosen")
    assert kept(read_leg(path))
    assert "chosen" in verdict(read_leg(path))
    leg = Leg(path, "torch", SETTINGS)
    assert leg.step("first", counted)
    assert leg.step("second", counted)
    assert outcomes(path) == {"second": "kept", "first": "kept"}
    assert len(calls) == 2


def test_missing_package_is_named_before_any_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "NEEDED", ("numpy", "no_such_package"))
    assert gpu.main(["--output", str(tmp_path / "found")]) == 2
    assert quotes(capsys.readouterr().err, "no_such_package")
    assert not (tmp_path / "found").exists()


def test_missing_gpu_exits_2_without_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "cuda_gpu", lambda: None)
    assert gpu.main(["torch", "--output", str(tmp_path / "found")]) == 2
    assert quotes(capsys.readouterr().err, "CUDA", "GPU")
    assert not (tmp_path / "found").exists()


def test_unknown_leg_is_rejected_with_known_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["onnx", "--output", str(tmp_path)]) == 2
    assert quotes(capsys.readouterr().err, "onnx", "prepare, cuda, torch, ort-cuda, tensorrt")


def test_checkout_without_install_registers_torch_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.importlib.metadata, "distributions", lambda: ())
    environment = gpu._environment(Job(tmp_path, "cpu", small=True))
    code = "import importlib.metadata as m; print(*[e.value for e in m.entry_points(group='drn.backends')])"
    # Isolated from what is installed, so that only what was written tells.
    place = environment["PYTHONPATH"].split(os.pathsep)[1]
    words = [
        sys.executable,
        "-S",
        "-c",
        f"import sys; sys.path = [p for p in sys.path if 'site-packages' not in p]; {code}",
    ]
    told = subprocess.run(words, capture_output=True, text=True, env={**environment, "PYTHONPATH": place}, check=True)
    assert told.stdout.split() == ["train.backend:open_checkpoint"]


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
def test_unmeasured_value_misses_the_target(value: float | None, tmp_path: Path) -> None:
    entries = targets.held("NVIDIA H200", dict.fromkeys(targets.BARS, value))
    assert {entry["verdict"] for entry in entries} == {"MISSED"}
    assert len(targets.missed(entries)) == len(targets.BARS)
    # Also once it is read from the file again.
    leg = Leg(tmp_path / "tensorrt.json", "tensorrt", SETTINGS)
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
    # Half of its time is enough for what is of use as far as it came.
    leg = Leg(path, "torch", SETTINGS, deadline=time.time() + 9)
    assert "kept" in acceptance.run_module(job, leg, "slow", max_seconds=6, ok=(0, 130))


def test_background_leg_interrupts_its_commands_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What a shell starts in the background ignores Ctrl-C, and so would what it starts.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)

    def run(job: Job, leg: Leg) -> None:
        (tmp_path / "slow.py").write_text(SLOW)
        told.append(acceptance.run_module(job, leg, "slow", max_seconds=4, ok=(130,)))

    told: list[str] = []
    monkeypatch.setattr(acceptance, "ROOT", tmp_path)
    monkeypatch.setattr("benchmarks.acceptance.leg_onnxruntime.run", run)
    try:
        gpu.run_inside(Job(tmp_path, "cpu", small=True), "ort-cuda", 60.0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert told[0].splitlines()[-1] == "kept"


def test_step_interrupted_twice_fails_without_retry(tmp_path: Path) -> None:
    path = tmp_path / "torch.json"
    for _ in range(2):
        leg = Leg(path, "torch", SETTINGS)
        # As when its process is killed.
        with pytest.raises(KeyboardInterrupt):
            leg.step("hangs", raising(KeyboardInterrupt()))
    leg = Leg(path, "torch", SETTINGS)
    assert not leg.step("hangs", lambda: pytest.fail("it was taken again"))
    assert leg.step("next", lambda: Found("done."))
    assert outcomes(path) == {"hangs": "failed", "next": "kept"}
    assert read_leg(path)["steps"][0]["told"]


def test_markdown_report_contains_every_table(tmp_path: Path) -> None:
    leg = Leg(tmp_path / "torch.json", "torch", {**SETTINGS, "command": "benchmarks/gpu.sh torch"})
    table = (("case", "p50 ms"), [["a | b", "0.1"]])
    leg.step("speed", lambda: Found("fast.", judged=False, tables={"speed": table}))
    leg.end("finished")
    text = markdown({"name": "GPU", "date": "2026-01-01", "machine": {}, "legs": [leg.content]})
    assert "| torch | passed (1 measured) |" in text
    assert "### speed" in text
    assert "| a \\| b | 0.1 |" in text


def test_gpu_tests_are_collected_without_optional_packages() -> None:
    absent = (
        "av", "fastapi", "starlette", "uvicorn", "multipart", "prometheus_client", "ray", "pyarrow", "tritonclient",
        "polygraphy", "schemathesis", "playwright", "tensorrt", "tensorrt_rtx", "h5py",
    )  # fmt: skip
    words = ["python", "-m", "pytest", "--collect-only", "-q", "-m", "gpu or trt", "-p", "no:cacheprovider"]
    # One of the absent ones has a plugin for pytest.
    alone = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    actual = ForkedCommand(words, alone, prepare=functools.partial(hide_modules, absent)).finish()
    assert actual.returncode == 0, actual.stdout[-2000:] + actual.stderr
    assert "test_tensorrt_backend.py" in actual.stdout
