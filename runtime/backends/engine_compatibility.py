"""Decide from its metadata file whether an engine can run on this machine, and which command rebuilds it, before
TensorRT loads it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.artifacts.engine_metadata import EngineMetadata, read_sidecar, read_verified
from runtime.backends.batch_shapes import MinOptMax
from runtime.core.errors import ModelFileError
from runtime.core.terminal import command_line

# What runs a plan, by the target it was built for. The lean runtime holds no builder and runs compatible plans only.
LIBRARIES = {"tensorrt": ("tensorrt",), "tensorrt-rtx": ("tensorrt_rtx",)}
LEAN = "tensorrt_lean"
# The name of a plan for queries of at most so many tokens, also where it was rejected.
_SHORT = re.compile(r"\.(?P<tokens>[0-9]{1,9})(?P<rest>(\.rejected)?\.engine)\Z")


@dataclasses.dataclass(frozen=True)
class HostInfo:
    """The GPU, driver and libraries of this machine.

    Attributes:
        library: name and version of the library that would run the plan, as "tensorrt 10.16.0"; None without one.
        why_no_library: what its import said.
        gpu: name of the GPU; None without one.
        capability: its compute capability, as "9.0".
        why_no_gpu: what CUDA said.
    """

    library: str | None
    gpu: str | None
    capability: str | None
    why_no_library: str = ""
    why_no_gpu: str = ""


def libraries(content: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the modules that may run a plan, the first choice first; empty for a target that is not known here."""
    names = LIBRARIES.get(str(content.get("target", "tensorrt")), ())
    return (*names, LEAN) if names == LIBRARIES["tensorrt"] and is_version_compatible(content) else names


def is_version_compatible(content: Mapping[str, Any]) -> bool:
    """Return whether a plan brings code for the host with it, as version-compatible ones do.

    Such a plan runs as a program, so its hash must be the one in the sidecar.
    """
    return bool(_options(content).get("version_compatible"))


def is_hardware_compatible(content: Mapping[str, Any]) -> bool:
    """Return whether a plan was built for Ampere and later, and not for one GPU."""
    return bool(_options(content).get("hardware_compatible"))


def incompatibility(plan: Path, sidecar: EngineMetadata, machine: HostInfo) -> str | None:
    """Return in one sentence why a plan cannot run on this machine, both sides named; None if it can."""
    content = sidecar.content
    built_by, built_for = str(content.get("library", "an unknown library")), built_for_gpu(content)
    what = f"{plan.name} was built by {built_by} for {built_for}"
    if machine.gpu is None or machine.capability is None:
        return (
            f"{what}, and no GPU can be used here ({machine.why_no_gpu}); run {source_onnx(plan, content)} on the CPU."
        )
    way_out = f"build it again here: `{rebuild_command(plan, sidecar)}`."
    if machine.library is None:
        return f"{what}, and that library cannot be imported here ({machine.why_no_library}); install it, or {way_out}"
    if not _same_library(built_by, machine.library, is_version_compatible(content)):
        return f"{what}, and this machine has {machine.library}; install {built_by}, or {way_out}"
    if not _fits(content, machine.gpu, machine.capability):
        return f"{what}, and this machine has {machine.gpu} ({machine.capability}); {way_out}"
    return None


def built_for_gpu(content: Mapping[str, Any]) -> str:
    """Return the GPUs that a plan was built for, as people say it."""
    capabilities = content.get("compute_capabilities") or ()
    if capabilities:
        return f"compute capability {', '.join(map(str, capabilities))}"
    if _options(content).get("hardware_compatible"):
        return "Ampere and later"
    name, capability = _gpu(content)
    return f"{name} ({capability})" if name else "an unknown GPU"


def rebuild_command(plan: Path, sidecar: EngineMetadata, query_length: int = 0, *, here: bool = False) -> str:
    """Return the command that builds a plan again, on the machine where it is to run.

    Args:
        plan: the engine's file.
        sidecar: of the plan.
        query_length: tokens that must fit in, where the plan's own profiles are too short.
        here: for this GPU alone, also where the plan was built to run on others.
    """
    # Built by itself it would stand in the way of the one that it belongs to.
    plan, sidecar = _longer(plan) or (plan, sidecar)
    content, manifest = sidecar.content, sidecar.manifest
    graphs = [name for name in manifest.sources if name.endswith(".onnx")]
    # The FP32 graph; the twin that parts were cut from follows it.
    source = graphs[0] if graphs else next(iter(manifest.sources), "drn.onnx")
    target = content.get("target", "tensorrt")
    options: dict[str, Any] = {
        "model": plan.with_name(source), "precision": manifest.precision, "target": target,
    }  # fmt: skip
    if manifest.precision in ("int8", "fp8"):
        table = source_onnx(plan, content).with_suffix(".calibration.json")
        options |= {"table": table} if table.is_file() else {"data": "DIR"}
    for name in ("batch",) if manifest.part == "clips" else ("batch", "query_length"):
        sizes = _range(content, name)
        if sizes and name == "query_length":
            sizes = sizes._replace(max=max(sizes.max, query_length))
        options[name] = sizes
    whole = manifest.part in ("whole", "query")
    # Without the flag, data would choose lengths for TensorRT.
    options["unroll"] = tuple(unrolled_steps(content)) or ((0,) if whole and target == "tensorrt" else ())
    built = _options(content)
    options["version_compatible"] = bool(built.get("version_compatible"))
    # A plan that failed on this GPU is built for it alone.
    options["hardware_compatible"] = bool(built.get("hardware_compatible")) and not here
    options["tf32"] = bool(built.get("tf32"))
    options["profiles"] = 1 if whole and built.get("profiles") == 1 and _has_two(content) else None
    options["split"] = manifest.part in ("video", "query")
    name = plan.name.replace(f".{manifest.part}.", ".query.", 1) if options["split"] else plan.name
    return command_line("export.build_engine", {**options, "output": plan.with_name(name)})


def unrolled_steps(content: Mapping[str, Any]) -> list[int]:
    """Return the longest queries of the plans beside a plan for short ones, by their names: drn.fp16.8.engine."""
    results = (_SHORT.search(name) for name in content.get("unrolled") or ())
    return sorted(int(name["tokens"]) for name in results if name)


def _has_two(content: Mapping[str, Any]) -> bool:
    """Return whether a build of the same batches has two profiles by default: one query, and several."""
    batch = _range(content, "batch")
    return batch is not None and batch.min == 1 < batch.max


def _longer(plan: Path) -> tuple[Path, EngineMetadata] | None:
    """Return the plan beside a plan for short queries that was built with it; None if it is not there, or the plan is
    none such."""
    longer = plan.with_name(_SHORT.sub(r"\g<rest>", plan.name))
    with contextlib.suppress(ModelFileError, OSError):
        if longer != plan and plan.name in read_verified(longer).get("unrolled", ()):
            return longer, read_sidecar(longer)
    return None


def _same_library(built_by: str, here: str, compatible: bool) -> bool:
    if built_by == here:
        return True
    (name, _, version), (other, _, newer) = built_by.partition(" "), here.partition(" ")
    if not compatible or {name, other} - {"tensorrt", LEAN}:
        return False
    numbers, others = _numbers(version), _numbers(newer)
    return bool(numbers) and numbers[:1] == others[:1] and others >= numbers


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]


def _fits(content: Mapping[str, Any], gpu: str, capability: str) -> bool:
    capabilities = content.get("compute_capabilities") or ()
    if capabilities:
        return capability in capabilities
    if _options(content).get("hardware_compatible"):
        return _numbers(capability) >= [8, 0]
    name, built_for = _gpu(content)
    return name is None or (name, built_for) == (gpu, capability)


def _gpu(content: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The name and compute capability in the sidecar's line: name, CUDA version, memory, capability."""
    fields = [field.strip() for field in str(content.get("gpu") or "").split(",")]
    return (fields[0], fields[-1]) if len(fields) > 1 else (None, None)


def _options(content: Mapping[str, Any]) -> Mapping[str, Any]:
    options = content.get("options")
    return options if isinstance(options, Mapping) else {}


def _range(content: Mapping[str, Any], name: str) -> MinOptMax | None:
    """Return the range of an axis over all profiles; None if the metadata file has no such ranges."""
    try:
        return MinOptMax.covering([MinOptMax(*map(int, profile[name])) for profile in content["profiles"]])
    except (KeyError, TypeError, ValueError):
        return None


def source_onnx(plan: Path, content: Mapping[str, Any]) -> Path:
    """Return the graph beside a plan that it was built from, as its sidecar names it."""
    hashes = content.get("sha256")
    names = [name for name in hashes if name.endswith(".onnx")] if isinstance(hashes, Mapping) else []
    return plan.with_name(names[0]) if names else plan.with_suffix(".onnx")
