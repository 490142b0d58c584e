"""Define a run of the GPU acceptance: paths, sizes, and functions that legs share."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from benchmarks.acceptance.step_log import Found, Leg, OutOfTime, Skip, Table, no_promise
from runtime.benchmarking.timing import Call, Latency, run_interleaved, warm_up
from runtime.core.errors import CheckFailed, GroundingError
from runtime.datasets.dataset import Annotation, DataSet

if TYPE_CHECKING:
    from runtime.core.video import Video
    from runtime.grounding.grounder import Grounder

ROOT = Path(__file__).resolve().parents[2]
# Points of recall: with the few hundred queries of the simulated test split, two queries may flip.
MAX_DROP = 1.0
# Time limit of an injected fault.
FAULT_SECONDS = 150.0
LATENCY_HEADER = ("case", "boundary", "queries", "p50 ms", "p90 ms", "p99 ms", "max ms", "calls", "queries/s")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the data set, the network and the measurements.

    Attributes:
        feature_dim: feature channels of the data set.
        videos: number of videos.
        network: size options of the training; empty for the published size.
        epochs: epochs of the three training stages.
        rates: learning rates of the three training stages.
        batches: batch sizes to time; the last is that of the throughput.
        samples: maximum samples per latency.
        seconds: maximum seconds per timing, after at least `min_calls`.
        min_calls: minimum samples per latency.
        calibration: number of calibration samples.
        query_length: MIN OPT MAX query length of engines; graphs have the same maximum.
        loss_steps: training steps of each stage whose losses are compared.
    """

    feature_dim: int
    videos: int
    network: Mapping[str, int]
    epochs: tuple[int, int, int]
    rates: tuple[float, float, float]
    batches: tuple[int, ...]
    samples: int
    seconds: float
    min_calls: int
    calibration: int
    query_length: tuple[int, int, int]
    loss_steps: int


FULL = Sizes(4096, 300, {}, (8, 1, 1), (5e-4, 1e-4, 1e-5), (1, 32, 256), 500, 5.0, 20, 256, (1, 8, 32), 3)
# For a machine that is available for minutes: two batch sizes, and shorter timings.
LEASE = dataclasses.replace(FULL, batches=(1, 256), samples=300, seconds=1.5)
SMALL = Sizes(
    32, 24, {"embed_dim": 16, "hidden_dim": 16, "fpn_dim": 32}, (1, 1, 1), (3e-3, 1e-3, 1e-4), (1, 4), 20, 0.1, 3, 32,
    (1, 8, 16), 1,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Job:
    """A run of the acceptance.

    Attributes:
        output: directory of inputs and results.
        device: cuda, or cpu for a rehearsal.
        small: whether to use a tiny network, for a rehearsal.
        order: full, or lease for a machine that is available for minutes: engines are built without a data set, and
            timings are shorter.
        stand_in: whether CUDA and TensorRT are test doubles, for a rehearsal.
    """

    output: Path
    device: str
    small: bool
    order: str = "full"
    stand_in: bool = False

    @property
    def rehearsal(self) -> bool:
        """Whether the results are not those of a GPU at full size."""
        return self.small or self.device != "cuda" or self.stand_in

    @property
    def sizes(self) -> Sizes:
        return SMALL if self.small else LEASE if self.is_lease else FULL

    @property
    def is_lease(self) -> bool:
        return self.order == "lease"

    @property
    def data(self) -> Path:
        return self.output / "data"

    @property
    def checkpoint(self) -> Path:
        return self.output / "run" / "drn.pt"

    @property
    def graph(self) -> Path:
        return self.output / "run" / "drn.onnx"

    @property
    def table(self) -> Path:
        """Calibration table, which the leg `prepare` measures for a lease."""
        return self.output / "run" / "drn.calibration.json"

    @property
    def query_graph(self) -> Path:
        return self.output / "run" / "drn.query.onnx"

    def results(self, leg: str) -> Path:
        return self.output / f"{leg}.json"

    def flags(self) -> list[str]:
        flags = ["--output", str(self.output), "--device", self.device, *(["--small"] if self.small else [])]
        flags += ["--order", self.order] if self.is_lease else []
        return [*flags, *(["--stand-in"] if self.stand_in else [])]

    def command(self, leg: str) -> str:
        return shlex.join(["benchmarks/gpu.sh", leg, *self.flags()])

    def settings(self) -> dict[str, Any]:
        return {"device": self.device, "small": self.small, "order": self.order, "stand_in": self.stand_in}


def need(names: Sequence[str], user: str) -> None:
    """Raise Skip if a module cannot be imported."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise Skip(f"{', '.join(missing)} cannot be imported, but {user} needs it.")


def check_built(path: Path) -> None:
    """Raise Skip if a model was not built."""
    if not path.is_file():
        raise Skip(f"{path.name} was not built.")


def skipped(reason: str) -> NoReturn:
    """Skip a step."""
    raise Skip(reason)


def run_module(
    job: Job, leg: Leg, module: str, *words: object, max_seconds: float = 540, ok: Sequence[int] = (0,)
) -> str:
    """Run a command with its output in a log file, and return the output. After its time limit it gets SIGINT.

    Args:
        job: the job; logs go to its output directory.
        leg: the leg, which limits the time.
        module: module of the command.
        words: arguments of the command.
        max_seconds: time limit.
        ok: accepted exit codes; with 130, results after half of the time limit are accepted.

    Raises:
        CheckFailed: the command ended with exit code 1; the message is its own.
        GroundingError: the command ended with another exit code.
        OutOfTime: the leg left less than the time limit, and the command was not done.
    """
    seconds = max(min(max_seconds, leg.left - 5), 1)
    line = [sys.executable, "-m", module, *map(str, words)]
    number = len(leg.content["steps"])
    path = job.output / "logs" / f"{leg.content['leg']}-{number:02d}-{module}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    interrupted = False
    with open(path, "w+", encoding="utf-8") as stream:
        stream.write(f"$ python {shlex.join(line[1:])}\n")
        stream.flush()
        with subprocess.Popen(line, stdout=stream, stderr=subprocess.STDOUT, cwd=ROOT) as process:
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                interrupted = True
                process.send_signal(signal.SIGINT)
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
    output = path.read_text(encoding="utf-8", errors="replace")
    code = process.returncode
    if interrupted and seconds < (max_seconds / 2 if 130 in ok else max_seconds):
        raise OutOfTime
    if code in ok:
        return output
    last = [entry for entry in output.splitlines() if entry.strip()][-1]
    errors = [entry for entry in output.splitlines() if entry.startswith("error: ")]
    sentence = f"{(errors or [last])[-1].removeprefix('error: ')} ({path.relative_to(job.output)})"
    if interrupted:
        raise GroundingError(f"python -m {module} exceeded its time limit: {sentence}", code="out_of_time")
    raise (CheckFailed if code == 1 and errors else GroundingError)(
        sentence if code in (1, 2) else f"python -m {module} ended with code {code}: {sentence}"
    )


def annotations_of(job: Job, split: str = "test") -> list[Annotation]:
    return DataSet(job.data).annotations(split, invalid="drop", quiet=True)


def questions(job: Job, count: int) -> list[tuple[Video, str]]:
    """Return `count` pairs of the test split; pairs of a video share one object."""
    data_set, annotations = DataSet(job.data), annotations_of(job)
    queries = [annotations[index % len(annotations)] for index in range(count)]
    videos = {name: data_set.video(name) for name in {query.video for query in queries}}
    return [(videos[query.video], query.sentence) for query in queries]


def device_of(job: Job) -> Any:
    return "cuda" if job.device == "cuda" else "cpu"


def judge(job: Job, reference: Grounder, other: Grounder, precision: str, names: tuple[str, str]) -> Found:
    """Check the parity of two models on every query of the test split."""
    from export.parity.compare import compare
    from export.parity.parity_result import AccuracyBudget, violations

    parity = compare(reference, other, DataSet(job.data), annotations_of(job), batch_size=8 if job.small else 32)
    broken = violations(parity, AccuracyBudget.of(precision, MAX_DROP))
    worst = max(error.max / max(error.largest, 1e-9) for error in parity.heads.values())
    summary = (
        f"{names[1]} compared with {names[0]}, {parity.queries} queries: 99 % of the boundaries differ by at most "
        f"{parity.boundaries.p99:.2g} s, heads by {worst:.1e} of their range, R@1 IoU=0.7 by "
        f"{100 * parity.differences['R@1 IoU=0.7'].mean:+.2f} points."
    )
    return Found(summary, parity.to_dict(), broken)


def take_times(job: Job, calls: Mapping[str, Call]) -> dict[str, list[float]]:
    """Time calls in turns after warming up, and return the seconds of each."""
    warm_up(list(calls.values()), max_seconds=job.sizes.seconds)
    samples: list[list[float]] = [[] for _ in calls]
    run_interleaved(
        list(calls.values()),
        job.sizes.samples,
        samples,
        max_seconds=job.sizes.seconds * len(calls),
        min_rounds=job.sizes.min_calls,
    )
    return dict(zip(calls, samples))


def ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def latency_entry(name: str, boundary: str, queries: int, seconds: Sequence[float]) -> dict[str, Any]:
    """Return a timing as an entry of the JSON file."""
    latency = Latency.from_samples(seconds)
    rate = 1e3 * queries / latency.mean_ms if latency.mean_ms else 0.0
    identity = {"case": name, "boundary": boundary, "queries": queries}
    return {**identity, **dataclasses.asdict(latency), "queries_per_s": rate}


def latency_table(entries: Sequence[Mapping[str, Any]]) -> Table:
    """Return entries of `latency_entry` as a table."""
    rows = []
    for entry in entries:
        latencies = [ms(entry[f"{name}_ms"]) for name in ("p50", "p90", "p99", "max")]
        counts = [str(entry["samples"]), f"{entry['queries_per_s']:,.0f}"]
        rows.append([entry["case"], entry["boundary"], str(entry["queries"]), *latencies, *counts])
    return LATENCY_HEADER, rows


def fault(job: Job, leg: Leg, name: str, model: Path, needs_gpu: bool = True) -> Found:
    """Inject a fault in another process; see `benchmarks.acceptance.fault_injection`."""
    if needs_gpu and job.device != "cuda":
        raise Skip("This fault needs a GPU.")
    line = [sys.executable, "-m", "benchmarks.acceptance.fault_injection", name]
    line += [str(model), str(job.data), device_of(job)]
    seconds = max(min(FAULT_SECONDS, leg.left), 1)
    try:
        result = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=seconds)
    except subprocess.TimeoutExpired:
        if seconds < FAULT_SECONDS:
            raise OutOfTime from None
        return Found("", broken=[f"{name}: the process exceeded {FAULT_SECONDS:.0f} s and was killed"])
    lines = [entry for entry in result.stdout.splitlines() if entry.startswith("{")]
    if not lines:
        last = (result.stderr.strip() or "no message").splitlines()[-1]
        return Found("", broken=[f"{name}: the process ended with code {result.returncode}: {last}"])
    seen = json.loads(lines[-1])
    if result.returncode:
        return Found(seen["told"], seen, [f"{name}: the process ended with code {result.returncode} afterwards"])
    return Found(seen["told"], seen, [] if seen["ok"] else [name])


def gpu_absent(job: Job, model: Path) -> Found:
    """Request a GPU where CUDA has none: the expected result is exit code 2 and one error."""
    video, sentence = questions(job, 1)[0]
    line = [sys.executable, "-m", "runtime.infer", "--model", str(model), "--data", str(job.data)]
    line += ["--video", video.name, "--query", sentence, "--device", "cuda"]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=hidden, timeout=120)
    errors = [entry for entry in result.stderr.splitlines() if entry.startswith("error: ")]
    said = (errors or result.stderr.splitlines() or ["nothing"])[-1].removeprefix("error: ")
    broken = []
    if result.returncode != 2 or len(errors) != 1 or "Traceback" in result.stderr:
        broken.append(f"expected exit code 2 and one error, got exit code {result.returncode}")
    return Found(f"Error: {said}", {"exit_code": result.returncode, "said": said}, broken)


def benchmark_step(job: Job, leg: Leg, name: str, models: Sequence[Path]) -> Found:
    """Run `runtime.benchmark` on models; its report and plot are saved in the output directory."""
    if importlib.util.find_spec("runtime.benchmark") is None:
        raise Skip("This checkout has no runtime.benchmark.")
    report = job.output / f"benchmark-{name}.json"
    words: list[object] = ["--model", models[0]]
    if models[1:]:
        words += ["--compare", *models[1:]]
    words += ["--samples", job.sizes.samples, "--batch", job.sizes.batches[-1], "--device", device_of(job)]
    words += ["--data", job.data, "--output", report]
    if importlib.util.find_spec("matplotlib"):
        words += ["--plot", report.with_suffix(".png")]
    max_seconds = 60 if job.is_lease else 120 if job.small else 400
    run_module(job, leg, "runtime.benchmark", *words, max_seconds=max_seconds, ok=(0, 130))
    content = json.loads(report.read_text(encoding="utf-8"))
    entries = []
    for timing in content["timings"]:
        latency, case = timing["latency"], timing["case"]
        if latency is not None and case["group"] != "query length":
            label = f"{timing['model']}: {case['name']}, {case['group']}"
            rate = timing["queries_per_s"] or 0.0
            entries.append({**latency, "case": label, "queries_per_s": rate,
                            "boundary": case["boundary"], "queries": case["queries"]})  # fmt: skip
    note = " The time limit ended it early." if content["interrupted"] else ""
    names = ", ".join(path.name for path in models)
    summary = f"{len(content['timings'])} timings of {names} are in {report.name}.{note}"
    values = {"report": report.name, "interrupted": content["interrupted"]}
    return no_promise(summary, values, {f"speed, {name}": latency_table(entries)})
