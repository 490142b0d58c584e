"""Define one run of the GPU acceptance: paths, sizes, and what the legs share."""

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

from benchmarks.acceptance.step_log import Found, Leg, OutOfTime, Skip, no_promise
from runtime.benchmarking.timing import Call, Latency, run_interleaved, warm_up
from runtime.core.errors import CheckFailed, GroundingError
from runtime.datasets.dataset import Annotation, DataSet

if TYPE_CHECKING:
    from runtime.core.video import Video
    from runtime.grounding.grounder import Grounder

ROOT = Path(__file__).resolve().parents[2]
# Points of recall: the made-up test split is a few hundred queries, so that one is 0.4 points and two may flip.
MAX_DROP = 1.0
# A fault that takes longer hangs.
FAULT_SECONDS = 150.0
LATENCY_HEADER = ("case", "boundary", "queries", "p50 ms", "p90 ms", "p99 ms", "max ms", "calls", "queries/s")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is made and measured.

    Attributes:
        feature_dim, videos: of the data set.
        network: options of the training that set the network's size; empty for the published one.
        epochs, rates: of the three stages of training.
        batches: queries at once that are timed; the last is the throughput's.
        samples: of every latency.
        seconds: a timing ends after, though not before `fewest` calls.
        fewest: see there.
        calibration: training queries that ranges come from.
        query_length: MIN OPT MAX words that engines take, and MAX that graphs do.
    """

    feature_dim: int
    videos: int
    network: Mapping[str, int]
    epochs: tuple[int, int, int]
    rates: tuple[float, float, float]
    batches: tuple[int, ...]
    samples: int
    seconds: float
    fewest: int
    calibration: int
    query_length: tuple[int, int, int]


FULL = Sizes(4096, 300, {}, (8, 1, 1), (5e-4, 1e-4, 1e-5), (1, 32, 256), 500, 5.0, 20, 256, (1, 8, 32))
# For a machine that is available for minutes: two batch sizes, and each timing ends sooner.
LEASE = dataclasses.replace(FULL, batches=(1, 256), samples=300, seconds=1.5)
SMALL = Sizes(
    32, 24, {"embed_dim": 16, "hidden_dim": 16, "fpn_dim": 32}, (2, 1, 1), (3e-3, 1e-3, 1e-4), (1, 4), 20, 0.1, 3, 32,
    (1, 8, 16),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of the acceptance.

    Attributes:
        output: directory of all that is made and found.
        device: cuda, or cpu for a rehearsal.
        small: whether everything is tiny, for a rehearsal too.
        order: full, or lease for a machine that is available for minutes: engines are built without a data set and
            each timing is shorter.
        stand_in: whether CUDA and TensorRT are the test doubles, for a rehearsal of the legs that need them.
    """

    output: Path
    device: str
    small: bool
    order: str = "full"
    stand_in: bool = False

    @property
    def rehearsal(self) -> bool:
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
        """Ranges for INT8, which the leg `prepare` measures for a lease."""
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


def need(names: Sequence[str], what: str) -> None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise Skip(f"{', '.join(missing)} cannot be imported, which {what} needs.")


def there(path: Path) -> None:
    if not path.is_file():
        raise Skip(f"{path.name} was not built.")


def skipped(reason: str) -> NoReturn:
    raise Skip(reason)


def run_module(job: Job, leg: Leg, module: str, *words: object, most: float = 540, ok: Sequence[int] = (0,)) -> str:
    """Run one of our commands, its output in a file, and return that; a command that takes too long gets Ctrl-C.

    Args:
        job, leg: what it is for.
        module, words: the command.
        most: seconds that it may take.
        ok: exit codes that are well; with 130 also what it has found after half of its time.

    Raises:
        CheckFailed, GroundingError: the command ended so; the sentence is its own.
        OutOfTime: it began too late in the leg to be judged.
    """
    seconds = max(min(most, leg.left - 5), 1)
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
    told = path.read_text(encoding="utf-8", errors="replace")
    code = process.returncode
    if interrupted and seconds < (most / 2 if 130 in ok else most):
        raise OutOfTime
    if code in ok:
        return told
    last = [entry for entry in told.splitlines() if entry.strip()][-1]
    errors = [entry for entry in told.splitlines() if entry.startswith("error: ")]
    sentence = f"{(errors or [last])[-1].removeprefix('error: ')} ({path.relative_to(job.output)})"
    if interrupted:
        raise GroundingError(f"python -m {module} was not done in time: {sentence}", code="out_of_time")
    raise (CheckFailed if code == 1 and errors else GroundingError)(
        sentence if code in (1, 2) else f"python -m {module} ended with code {code}: {sentence}"
    )


def annotations_of(job: Job, split: str = "test") -> list[Annotation]:
    return DataSet(job.data).annotations(split, invalid="drop", quiet=True)


def questions(job: Job, count: int) -> list[tuple[Video, str]]:
    """Return so many pairs of the test split, each video one object."""

    data_set, known = DataSet(job.data), annotations_of(job)
    chosen = [known[index % len(known)] for index in range(count)]
    videos = {name: data_set.video(name) for name in {annotation.video for annotation in chosen}}
    return [(videos[annotation.video], annotation.sentence) for annotation in chosen]


def device_of(job: Job) -> Any:
    return "cuda" if job.device == "cuda" else "cpu"


def judge(job: Job, reference: Grounder, other: Grounder, precision: str, names: tuple[str, str]) -> Found:
    """Hold the answers of a model against another's, to every query of the test split, within the parity budget."""
    from export.parity.compare import compare
    from export.parity.parity_result import AccuracyBudget
    from export.parity.parity_result import violations as broken_of

    asked = annotations_of(job)
    parity = compare(reference, other, DataSet(job.data), asked, batch_size=8 if job.small else 32)
    broken = broken_of(parity, AccuracyBudget.of(precision, MAX_DROP))
    worst = max(error.max / max(error.largest, 1e-9) for error in parity.heads.values())
    told = (
        f"{names[1]} against {names[0]}, {parity.queries} queries: 99 % of the borders move by at most "
        f"{parity.boundaries.p99:.2g} s, heads by {worst:.1e} of their range, R@1 IoU=0.7 by "
        f"{100 * parity.differences['R@1 IoU=0.7'].mean:+.2f} points."
    )
    return Found(told, parity.to_dict(), broken)


def take_times(job: Job, calls: Mapping[str, Call]) -> dict[str, list[float]]:
    """Return the seconds of each call, taken in turns after warming up."""

    warm_up(list(calls.values()), max_seconds=job.sizes.seconds)
    samples: list[list[float]] = [[] for _ in calls]
    run_interleaved(
        list(calls.values()),
        job.sizes.samples,
        samples,
        max_seconds=job.sizes.seconds * len(calls),
        min_rounds=job.sizes.fewest,
    )
    return dict(zip(calls, samples))


def ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def latency_row(name: str, boundary: str, queries: int, seconds: Sequence[float]) -> tuple[dict[str, Any], list[str]]:
    """Return a timing for the JSON file and for a table of `LATENCY_HEADER`."""

    latency: Latency = Latency.from_samples(seconds)
    rate = 1e3 * queries / latency.mean_ms if latency.mean_ms else 0.0
    cells = [*map(ms, (latency.p50_ms, latency.p90_ms, latency.p99_ms, latency.max_ms)), str(latency.samples)]
    values = {
        "case": name,
        "boundary": boundary,
        "queries": queries,
        **dataclasses.asdict(latency),
        "queries_per_s": rate,
    }
    return values, [name, boundary, str(queries), *cells, f"{rate:,.0f}"]


def fault(job: Job, leg: Leg, name: str, model: Path, needs_gpu: bool = True) -> Found:
    """Bring about a fault in a process of its own; see `benchmarks.acceptance.fault_injection`."""
    if needs_gpu and job.device != "cuda":
        raise Skip("This fault needs a GPU.")
    line = [
        sys.executable,
        "-m",
        "benchmarks.acceptance.fault_injection",
        name,
        str(model),
        str(job.data),
        device_of(job),
    ]
    seconds = max(min(FAULT_SECONDS, leg.left), 1)
    try:
        result = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=seconds)
    except subprocess.TimeoutExpired:
        if seconds < FAULT_SECONDS:
            raise OutOfTime from None
        return Found("", broken=[f"{name}: it hung, and was ended"])
    lines = [entry for entry in result.stdout.splitlines() if entry.startswith("{")]
    if not lines:
        said = (result.stderr.strip() or "nothing").splitlines()[-1]
        return Found("", broken=[f"{name}: the process ended with code {result.returncode}, saying: {said}"])
    seen = json.loads(lines[-1])
    if result.returncode:
        return Found(seen["told"], seen, [f"{name}: the process ended with code {result.returncode} afterwards"])
    return Found(seen["told"], seen, [] if seen["ok"] else [name])


def gpu_absent(job: Job, model: Path) -> Found:
    """A GPU is asked for where CUDA shows none: exit code 2 and one sentence."""
    video, sentence = questions(job, 1)[0]
    line = [sys.executable, "-m", "runtime.infer", "--model", str(model), "--data", str(job.data)]
    line += ["--video", video.name, "--query", sentence, "--device", "cuda"]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, env=hidden, timeout=120)
    errors = [entry for entry in result.stderr.splitlines() if entry.startswith("error: ")]
    said = (errors or result.stderr.splitlines() or ["nothing"])[-1].removeprefix("error: ")
    broken = []
    if result.returncode != 2 or len(errors) != 1 or "Traceback" in result.stderr:
        broken.append(f"exit code 2 and one sentence were expected, and {result.returncode} came")
    return Found(f"It says: {said}", {"exit_code": result.returncode, "said": said}, broken)


def benchmark_step(job: Job, leg: Leg, name: str, models: Sequence[Path]) -> Found:
    """Run `runtime.benchmark` on models, which take turns; its report and picture stay in the directory."""
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
    run_module(
        job, leg, "runtime.benchmark", *words, most=60 if job.is_lease else 120 if job.small else 400, ok=(0, 130)
    )
    found = json.loads(report.read_text(encoding="utf-8"))
    rows = []
    for timing in found["timings"]:
        latency, case = timing["latency"], timing["case"]
        if latency is None or case["group"] == "query length":
            continue
        cells = [ms(latency[f"{key}_ms"]) for key in ("p50", "p90", "p99", "max")]
        label = f"{timing['model']}: {case['name']}, {case['group']}"
        rate = f"{timing['queries_per_s'] or 0:,.0f}"
        rows.append([label, case["boundary"], str(case["queries"]), *cells, str(latency["samples"]), rate])
    ended = " It was ended early, since time was short." if found["interrupted"] else ""
    told = f"{len(found['timings'])} timings of {', '.join(path.name for path in models)} are in {report.name}.{ended}"
    values = {"report": report.name, "interrupted": found["interrupted"]}
    return no_promise(told, values, {f"speed, {name}": (LATENCY_HEADER, rows)})
