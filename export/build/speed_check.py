"""Measure whether a reduced-precision model is faster on this machine than the model that it replaces."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from calib.graph.onnx_session import InMemorySplitBackend
from calib.graph.split_model import split_graph
from export.build.artifacts import ConvertedModel
from export.build.build_config import BuildConfig, BuildRequest
from export.engine.builder import BuildOptions, runs_here
from runtime.artifacts import engine_metadata
from runtime.artifacts.manifest import Manifest
from runtime.benchmarking.timing import Ratio, speed_ratio, time_interleaved
from runtime.benchmarking.workload import (
    BenchmarkedModel,
    dataset_workload,
    device_of,
    pairs_with_known_words,
    synthetic_workload,
)
from runtime.core.cpu_info import cpu_features, cpu_name
from runtime.core.errors import GroundingError
from runtime.core.gpu_info import selected_gpu
from runtime.grounding.grounder import Grounder

if TYPE_CHECKING:
    import onnx

log = logging.getLogger("drn")

BATCH = 32
# Limits of each of the two measurements: rounds, seconds, and seconds of warm-up for each model.
ROUNDS, SECONDS, WARM_UP_SECONDS = 300, 4.0, 1.0

Verdict = Literal["faster", "not faster", "not proven", "not measured"]


@dataclasses.dataclass(frozen=True)
class SpeedCheck:
    """The speed of a model relative to a reference, both timed in turns on this machine.

    Attributes:
        model, reference: file names; `reference` is empty if nothing was measured.
        min_speedup: speed that the model must reach, relative to the reference.
        single: relative speed for one query, from text to moments; None if not measured.
        batched: relative speed for a batch of `BATCH` queries; None if not measured.
        machine: processor that ran the models.
        reason: why nothing was measured, as a sentence; empty if it was.
    """

    model: str
    reference: str
    min_speedup: float
    single: Ratio | None = None
    batched: Ratio | None = None
    machine: str = ""
    reason: str = ""

    @property
    def verdict(self) -> Verdict:
        """Return whether the model is fast enough for one query or for a batch; intervals decide."""
        if self.single is None or self.batched is None:
            return "not measured"
        ratios = (self.single, self.batched)
        if any(ratio.low >= self.min_speedup for ratio in ratios):
            return "faster"
        return "not faster" if all(ratio.high < self.min_speedup for ratio in ratios) else "not proven"

    @property
    def score(self) -> float:
        """Return the geometric mean of both relative speeds; 0 if nothing was measured."""
        if self.single is None or self.batched is None:
            return 0.0
        return math.sqrt(self.single.median * self.batched.median)

    def sentence(self) -> str:
        """Return the result in one or two sentences."""
        if self.single is None or self.batched is None:
            return f"The speed was not measured. {self.reason}"
        figures = (
            f"{self.model} has {_format(self.single)} the speed of {self.reference} for one query and "
            f"{_format(self.batched)} for {BATCH} queries, on {self.machine}."
        )
        if self.verdict == "faster":
            return figures
        if self.verdict == "not proven":
            return f"A speed of {self.min_speedup:g} is not proven: {figures}"
        return f"Not faster here: {figures} Use {self.reference} on this machine."

    def to_dict(self) -> dict[str, Any]:
        """Return the values for a JSON file."""
        return {"verdict": self.verdict, "sentence": self.sentence(), **dataclasses.asdict(self)}


def check_speed(
    request: BuildRequest,
    staged: BuildConfig,
    name: str,
    options: BuildOptions,
    source: tuple[Path, onnx.ModelProto],
    model: ConvertedModel,
) -> SpeedCheck | None:
    """Time the output of a build and the model that it replaces; None if --min-speedup is 0.

    An INT8 graph for a CPU replaces the FP32 graph. An engine replaces the FP16 engine of the same graph, which must
    exist, because it takes minutes to build.

    Args:
        staged: files of the build in the staging directory, with the model to time.
        name: final file name of that model.
        source: file of the FP32 graph, and the graph.
    """
    if not request.required_speed:
        return None
    if staged.library:

        def open_for_cpu() -> list[Grounder]:
            if request.split:
                reference = Grounder(InMemorySplitBackend(*split_graph(source[1]), request.threads, True))
            else:
                reference = Grounder.load(source[0], "cpu", request.threads)
            return [reference, Grounder.load(staged.output, "cpu", request.threads)]

        return measure_speed((source[0].name, name), open_for_cpu, request.required_speed, request.data)
    half = dataclasses.replace(staged, precision="fp16", requested_output=None).output
    reason = ""
    if not runs_here(options):
        reason = "This machine cannot run the engine."
    elif request.precision == "fp16" or not _same_source(half, model.manifest):
        reason = f"There is no FP16 engine {half.name} of this graph to compare with. Build it first."
    if reason:
        return SpeedCheck(name, "", request.required_speed, reason=reason)

    def open_engines() -> list[Grounder]:
        return [Grounder.load(path, "cuda") for path in (half, staged.output)]

    return measure_speed((half.name, name), open_engines, request.required_speed, request.data)


def measure_speed(
    names: tuple[str, str],
    open_models: Callable[[], Sequence[Grounder]],
    min_speedup: float,
    data: Path | None,
) -> SpeedCheck:
    """Time a reference and a model in turns, for one query and for a batch.

    Args:
        names: file names of the reference and of the model.
        open_models: opens the reference and the model, in this order.
        min_speedup: speed that the model must reach, relative to the reference.
        data: directory of the data set with the queries. None: synthetic queries.

    Returns:
        The measurement, or the reason why a model could not be opened or timed.
    """
    log.info("Timing %s and %s in turns ...", *names)
    try:
        grounders = open_models()
        manifests = [grounder.manifest for grounder in grounders]
        workload = dataset_workload(data, None, ()) if data else synthetic_workload(manifests, BATCH)
        pairs = pairs_with_known_words(workload.pairs, grounders)
        models = [BenchmarkedModel.from_grounder(name, grounder, pairs) for name, grounder in zip(names, grounders)]
        single, batched = (
            time_interleaved([model.ground_call(queries) for model in models], ROUNDS, SECONDS, WARM_UP_SECONDS)
            for queries in (1, BATCH)
        )
    except GroundingError as error:
        return SpeedCheck(names[1], "", min_speedup, reason=str(error))
    return SpeedCheck(
        names[1],
        names[0],
        min_speedup,
        speed_ratio(single[1], single[0]),
        speed_ratio(batched[1], batched[0]),
        _machine(grounders[1]),
    )


def _same_source(engine: Path, manifest: Manifest) -> bool:
    """Return whether an engine exists and was made from the source files of `manifest`."""
    if not engine.is_file():
        return False
    recorded = engine_metadata.read_sidecar(engine).manifest.sources
    return all(recorded.get(name) == digest for name, digest in manifest.sources.items())


def _format(ratio: Ratio) -> str:
    return f"{ratio.median:.2f} times ({ratio.low:.2f} to {ratio.high:.2f})"


def _machine(grounder: Grounder) -> str:
    gpu = selected_gpu() if device_of(grounder) == "cuda" else None
    if gpu:
        return gpu.name
    features = cpu_features() or ()
    if "avx2" not in features:
        return cpu_name()
    # VNNI decides the speed of 8-bit matrix products on x86.
    return f"{cpu_name()} {'with' if any('vnni' in name for name in features) else 'without'} VNNI"
