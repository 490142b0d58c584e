"""Run the leg `prepare`: create the models and data that the other legs use."""

from __future__ import annotations

import importlib.util
import time
from typing import Literal

from benchmarks.acceptance.run_config import Job, annotations_of
from benchmarks.acceptance.step_log import Found, Leg, Skip, no_promise

# `auto` compares the methods on held-out videos, which takes minutes.
FIXED_METHOD: Literal["percentile"] = "percentile"
NEEDED = ("torch", "onnx", "onnxscript", "onnxruntime", "matplotlib")


def run(job: Job, leg: Leg) -> None:
    """Create a data set, a network trained on it, and its graphs, once for all legs."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise Skip(
            f"{', '.join(missing)} cannot be imported. Run the leg prepare on a machine with them, and copy its output."
        )
    if leg.step("data set", lambda: _make_data(job)) and leg.step("network", lambda: _make_network(job)):
        leg.step("graphs", lambda: _make_graphs(job))
        if job.is_lease:
            leg.step("ranges for INT8", lambda: _measure_ranges(job))


def _make_data(job: Job) -> Found:
    from train.simulate import simulate

    simulate(job.data, feature_dim=job.sizes.feature_dim, videos=job.sizes.videos, difficulty="easy", seed=0)
    queries = {split: len(annotations_of(job, split)) for split in ("train", "test")}
    summary = (
        f"{job.sizes.videos} videos of width {job.sizes.feature_dim}, {queries['train']} queries to learn from and "
    )
    return no_promise(f"{summary}{queries['test']} to be asked; features are simulated.", queries)


def _make_network(job: Job) -> Found:
    from train.__main__ import train

    started = time.perf_counter()
    train(
        job.data,
        job.checkpoint.parent,
        epochs=job.sizes.epochs,
        lr=job.sizes.rates,
        iou_target="all",
        validate_on="none",
        device=job.device,
        resume=True,
        **job.sizes.network,  # type: ignore[arg-type]
    )
    seconds = time.perf_counter() - started
    from train.checkpoints import load_checkpoint

    count = sum(weights.numel() for weights in load_checkpoint(job.checkpoint).weights.values())
    return no_promise(f"{count / 1e6:.1f} million weights trained on {job.device} in {seconds:.0f} s.")


def _make_graphs(job: Job) -> Found:
    from export.to_onnx import to_onnx

    to_onnx(job.checkpoint, job.graph, split=True, max_query_length=job.sizes.query_length[2])
    return Found(f"{job.graph.name} and its pair answer as torch does on the CPU.")


def _measure_ranges(job: Job) -> Found:
    """Measure the ranges in the background, so that the INT8 engine can be built without a data set."""
    from calib.calibrate import calibrate

    calibrate(job.graph, job.data, job.table, method=FIXED_METHOD, samples=job.sizes.calibration)
    return no_promise(f"{job.table.name}: {FIXED_METHOD} over {job.sizes.calibration} training queries.")
