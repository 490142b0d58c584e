"""Build the engines of the acceptance, locate them, including rejected ones, and time single plans."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.acceptance.leg_prepare import FIXED_METHOD
from benchmarks.acceptance.run_config import MAX_DROP, Job, latency_entry, latency_table, run_module, take_times
from benchmarks.acceptance.step_log import Found, Leg, Skip, no_promise
from runtime.artifacts.engine_layers import EngineLayerStats, layers_path, read_layers_file
from runtime.artifacts.engine_metadata import read_sidecar, read_verified
from runtime.benchmarking.timing import Call
from runtime.core.errors import CheckFailed, DeviceError, GroundingError, ModelFileError

# Query lengths for which the LSTM is unrolled.
UNROLLED = (6, 10)
# In a lease one plan, which takes nearly all queries, because each is another build.
UNROLLED_IN_LEASE = (10,)
NARROW = ("int8", "fp8")
# Precisions that are compared with each other.
UNROLLED_IN = ("fp16", *NARROW)
# With these, three FP16 plans of the published size took 107 s on an H200 (TensorRT 8.6.0). With the defaults (two
# profiles, level 3) two plans, built concurrently, took longer than 70 s.
QUICK: tuple[object, ...] = ("--profiles", 1, "--optimization-level", 2)


# Variants of an engine: built with the default effort in a lease; INT8 without weights that are only stored in 8 bits,
# which an engine may dequantize for every query.
DEFAULT_EFFORT, COMPUTED_ONLY = "defaults", "computed-only"


def engine_path(job: Job, target: str, precision: str, split: bool, variant: str = "") -> Path:
    """Return the path of an engine; each variant is in another directory."""
    folder = f"{target}-{variant}" if variant else target
    return job.output / folder / f"drn.{precision}{'.query' if split else ''}.engine"


def built_engine(path: Path) -> Path:
    """Return the path of an engine, or of its rejected file.

    Raises:
        Skip: neither exists.
    """
    rejected = path.with_name(f"{path.stem}.rejected.engine")
    for candidate in (path, rejected):
        if candidate.is_file():
            return candidate
    raise Skip(f"{path.name} was not built.")


def unrolled_tokens(job: Job) -> list[int]:
    """Return the query lengths for which the LSTM is unrolled."""
    chosen = UNROLLED_IN_LEASE if job.is_lease else UNROLLED
    return [tokens for tokens in chosen if tokens <= job.sizes.query_length[2]]


def build(job: Job, leg: Leg, target: Any, precision: Any, split: bool, variant: str = "") -> Found:
    """Build an engine, and report the precision of its layers.

    Args:
        job: the job.
        leg: the leg.
        target: tensorrt or tensorrt-rtx.
        precision: precision of the engine.
        split: whether to split the model.
        variant: DEFAULT_EFFORT, which takes minutes, COMPUTED_ONLY, or neither.
    """
    from calib.qdq_quantizer import QuantizationPolicy
    from export.engine.builder import BuildOptions, check_options

    capabilities = () if job.device == "cuda" else ("8.6",)
    options = BuildOptions(target=target, precision=precision, profiles=(), compute_capabilities=capabilities)
    try:
        check_options(options)
    except DeviceError as error:
        raise Skip(str(error)) from error
    output = engine_path(job, target, precision, split, variant)
    largest = str(job.sizes.batches[-1])
    words: list[object] = ["--model", job.graph, "--precision", precision, "--target", target, "--output", output]
    words += ["--batch", 1, largest, largest, *_data_words(job, precision)]
    words += ["--split", "--unroll", *unrolled_tokens(job)] if split and precision in UNROLLED_IN else []
    words += ["--split"] if split and precision not in UNROLLED_IN else []
    # The other models are measured with the LSTM as a loop, because each unrolled one is another build.
    words += [] if split and precision in UNROLLED_IN else ["--unroll", 0]
    # The speed is measured in steps of its own.
    words += ["--query-length", *job.sizes.query_length, "--min-speedup", 0]
    words += ["--compute-capability", *capabilities] if capabilities else []
    words += ["--timing-cache", output.with_name("timing.cache")] if target == "tensorrt" else []
    words += ["--keep", *QuantizationPolicy().stored] if variant == COMPUTED_ONLY else []
    words += QUICK if job.is_lease and variant != DEFAULT_EFFORT else ()
    try:
        run_module(job, leg, "export.build_engine", *words, max_seconds=400)
    except CheckFailed as error:
        # Later steps use the engine that was saved as rejected.
        return Found("", broken=[str(error).rstrip(".")])
    parts = [output, output.with_name(output.name.replace(".query.", ".video."))] if split else [output]
    parts += [output.with_name(name) for name in read_sidecar(output).content.get("unrolled", ())]
    census = {path.name: read_sidecar(path).content["census"] for path in parts}
    layers = [f"{name}: {_layers(counted)}" for name, counted in census.items()]
    size = sum(path.stat().st_size for path in parts) / 1e6
    return Found(f"{size:.1f} MB; {'; '.join(layers)}.", {"census": census})


def build_computed_only(job: Job, leg: Leg, target: Any) -> Found:
    """Build INT8 without weights that are only stored in 8 bits, for a comparison of their speed."""
    stored = built_engine(engine_path(job, target, "int8", split=True))
    if not read_verified(stored).get("strongly_typed"):
        raise Skip("This library does not store weights in the type of the graph.")
    return build(job, leg, target, "int8", split=True, variant=COMPUTED_ONLY)


def _data_words(job: Job, precision: str) -> list[object]:
    """Return the options of the checks of a build. In a lease, a parity step follows it instead."""
    calibration: list[object] = ["--calib-samples", job.sizes.calibration]
    if not job.is_lease:
        return ["--data", job.data, "--max-drop", MAX_DROP, *calibration]
    if precision not in NARROW:
        return []
    if job.table.is_file():
        return ["--table", job.table]
    return ["--data", job.data, "--max-drop", MAX_DROP, "--calib-method", FIXED_METHOD, *calibration]


def _layers(counted: Mapping[str, Any]) -> str:
    engine = counted.get("engine")
    if engine:
        counts = EngineLayerStats(**engine)
        return f"{counts} ({counted.get('verdict', 'not judged')})"
    shares = counted["twin"]["shares"]
    return ", ".join(f"{100 * share:.1f} % in {kind}" for kind, share in shares.items()) + " (the twin's)"


def layers_step(job: Job, target: str, precision: str) -> Found:
    """List the plans, including rejected ones, with the verdict and the saved output of the inspector."""
    folder = engine_path(job, target, precision, split=True).parent
    plans = sorted(folder.glob(f"drn.{precision}.*engine"))
    if not plans:
        raise Skip(f"No {precision} engine was built.")
    values: dict[str, Any] = {}
    broken = []
    for plan in plans:
        census = read_verified(plan).get("census") or {}
        layers = layers_path(plan)
        values[plan.name] = {"verdict": census.get("verdict"), "layers": layers.name if layers.is_file() else None}
        if layers.is_file():
            try:
                read_layers_file(layers)
            except ModelFileError as error:
                broken.append(str(error).rstrip("."))
    saved = sum(entry["layers"] is not None for entry in values.values())
    broken += [] if saved else ["no plan has a saved output of the inspector"]
    return Found(f"{saved} of {len(values)} plans have a saved output of the inspector.", {"plans": values}, broken)


def time_rejected(job: Job, target: str) -> Found:
    """Time every rejected plan with random inputs of its maximum size."""
    from runtime.backends.cuda_driver import Cuda
    from runtime.backends.tensorrt_engine import TensorRTEngine

    paths = sorted((job.output / target).glob("*.rejected.engine"))
    if not paths:
        raise Skip("No engine was rejected.")
    from export.engine.builder import load_library

    library, cuda = load_library("tensorrt-rtx" if target == "tensorrt-rtx" else "tensorrt"), Cuda()
    entries, broken = [], []
    for path in paths:
        try:
            network = TensorRTEngine(library, cuda, path, read_sidecar(path))
            try:
                seconds = _time_plan(job, network)
            finally:
                network.close()
        except GroundingError as error:
            broken.append(f"{path.name} could not be timed: {str(error).rstrip('.')}")
            continue
        entries.append(latency_entry(path.name, "gpu", 1, seconds))
    summary = f"{len(entries)} of {len(paths)} rejected plans were timed."
    return Found(
        summary, {"timings": entries}, broken, judged=bool(broken), tables={"rejected": latency_table(entries)}
    )


def _time_plan(job: Job, network: Any) -> list[float]:
    profile = network.profiles[0]
    sizes = dict(profile.max_sizes())
    shapes = profile.shapes(network.tensors.axes, sizes)
    rng = np.random.default_rng(0)
    inputs = {name: np.ones(shape, np.int32) if "query" in name else rng.random(shape, np.float32)
              for name, shape in shapes.items() if name not in network.tensors.encodings}  # fmt: skip
    with network.lock, network.cuda.current():
        network.contexts.timed = True

        def run(_: object) -> Any:
            network.contexts.gpu_ms = 0.0
            return network.run(inputs, sizes)

        return take_times(job, {"plan": Call(run, device_seconds=lambda: network.contexts.gpu_ms / 1e3)})["plan"]


def make_builder(target: Any) -> Found:
    """Import the library and create a builder, which shows that it is complete and supports this GPU."""
    from export.engine.builder import load_library
    from runtime.backends.tensorrt_logger import logger_for

    library = load_library(target)
    builder = library.Builder(logger_for(library))
    if builder is None:
        raise DeviceError(f"{library.__name__} {library.__version__} could not create a builder on this GPU.")
    return no_promise(f"{library.__name__} {library.__version__} created a builder.")
