"""Run the leg `ort-cuda`: ONNX Runtime on CUDA against the CPU, and its speed."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.acceptance.run_config import (
    MAX_DROP,
    Job,
    benchmark_step,
    check_built,
    device_of,
    fault,
    gpu_absent,
    judge,
    need,
    run_module,
)
from benchmarks.acceptance.step_log import Found, Leg, Skip
from runtime.artifacts.manifest import METADATA_KEY, Manifest
from runtime.backends.onnxruntime_session import PROVIDERS, import_onnxruntime
from runtime.grounding.grounder import Grounder

# Operators that must run on the device; those of shapes always run on the CPU.
HEAVY = ("Conv", "MatMul", "Gemm", "LSTM", "FusedConv", "FusedMatMul")


def run(job: Job, leg: Leg) -> None:
    """Check the device of each node and the parity with the CPU, and time ONNX Runtime on CUDA."""
    need(("onnxruntime", "onnx"), "the leg")
    onnxruntime, _ = import_onnxruntime(gpu=job.device == "cuda")
    available = onnxruntime.get_available_providers()
    if job.device == "cuda" and "CUDAExecutionProvider" not in available:
        raise Skip(f"onnxruntime {onnxruntime.__version__} has {', '.join(available)}, but no CUDAExecutionProvider.")
    half = job.output / "ort" / "drn.fp16.query.onnx"
    leg.step("FP16 twin", lambda: _half_twin(job, leg, half))
    whole = half.with_name("drn.fp16.onnx")
    models = {"fp32": job.graph, "fp32, pair": job.query_graph, "fp16": whole, "fp16, pair": half}
    for name, path in models.items():
        leg.step(f"provider, {name}", functools.partial(_provider, job, path))
        leg.step(f"answers, {name}", functools.partial(_graph_answers, job, path))
    leg.step("fault: GPU absent", lambda: gpu_absent(job, job.graph))
    leg.step("fault: threads", lambda: fault(job, leg, "threads", job.query_graph, needs_gpu=False))
    leg.step("fault: fork", lambda: fault(job, leg, "fork", job.query_graph))
    leg.step("fault: out of memory", lambda: fault(job, leg, "memory", job.query_graph))
    leg.step("speed", lambda: benchmark_step(job, leg, "ort", [path for path in models.values() if path.is_file()]))


def _half_twin(job: Job, leg: Leg, output: Path) -> Found:
    words: list[object] = ["--model", job.graph, "--precision", "fp16", "--target", "onnxruntime", "--split"]
    words += ["--query-length", *job.sizes.query_length, "--output", output]
    # In a lease the step "answers" checks it, on the GPU.
    words += [] if job.is_lease else ["--data", job.data, "--max-drop", MAX_DROP]
    run_module(job, leg, "export.build_engine", *words)
    proven = "were written" if job.is_lease else "are proven against FP32 on the CPU"
    return Found(f"{output.name} and its video part {proven}.", judged=not job.is_lease)


def _provider(job: Job, path: Path) -> Found:
    """Count the nodes per device in ONNX Runtime's profile of one query."""
    import onnxruntime

    check_built(path)
    expected = PROVIDERS[device_of(job)]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = str(job.output / "logs" / "ort-profile")
    (job.output / "logs").mkdir(parents=True, exist_ok=True)
    session = onnxruntime.InferenceSession(str(path), options, providers=[expected])
    manifest = Manifest.from_json(session.get_modelmeta().custom_metadata_map.get(METADATA_KEY), str(path))
    feed = _feed(session, manifest)
    for _ in range(3):
        session.run(None, feed)
    log_file = Path(session.end_profiling())
    # Older versions also record waits before and after each node, without a provider.
    events = [event for event in json.loads(log_file.read_text(encoding="utf-8")) if _provider_of(event)]
    log_file.unlink()
    spent: dict[str, float] = {}
    nodes: dict[str, set[str]] = {}
    for event in events:
        where = _provider_of(event)
        if event.get("cat") == "Node":
            spent[where] = spent.get(where, 0.0) + event["dur"]
            nodes.setdefault(where, set()).add(event["name"])
    counts = {where: len(names) for where, names in nodes.items()}
    summary = ", ".join(f"{count} nodes on {where}" for where, count in counts.items())
    broken = []
    if session.get_providers()[0] != expected:
        broken.append(f"expected a session on {expected}, got {session.get_providers()[0]}")
    elsewhere = sorted(
        {event["name"] for event in events if event["args"].get("op_name") in HEAVY and _provider_of(event) != expected}
    )
    if elsewhere:
        broken.append(f"{len(elsewhere)} nodes with matrix products run elsewhere, such as {elsewhere[0]}")
    return Found(f"{path.name}: {summary}.", {"nodes": counts, "microseconds": spent}, broken)


def _provider_of(event: Mapping[str, Any]) -> Any:
    return event.get("args", {}).get("provider")


def _feed(session: Any, manifest: Any) -> dict[str, Any]:
    """Return the inputs of a graph for one query of six words on one video."""
    free = {"batch": 1, "query_length": 6, "video": 1}
    kinds = {"tensor(int32)": np.int32, "tensor(float)": np.float32, "tensor(float16)": np.float16}
    rng = np.random.default_rng(0)
    feed = {}
    for argument in session.get_inputs():
        shape = [size if isinstance(size, int) else free[size] for size in argument.shape]
        values = rng.integers(1, len(manifest.vocabulary), shape) if "int" in argument.type else rng.random(shape)
        feed[argument.name] = values.astype(kinds[argument.type])
    feed["query_length"] = np.array([6], np.int32)
    if "video_index" in feed:
        feed["video_index"] = np.zeros(1, np.int32)
    return feed


def _graph_answers(job: Job, path: Path) -> Found:
    check_built(path)
    other = Grounder.load(path, device_of(job))
    names = (f"{job.graph.name} on the CPU", f"{path.name} on {job.device}")
    return judge(job, Grounder.load(job.graph, "cpu"), other, other.manifest.precision, names)
