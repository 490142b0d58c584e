"""Check from an engine's metadata file whether the engine can run on this machine, and print the command to rebuild it.

TensorRT is not needed, so that an incompatible engine is reported before it is loaded. `content` is the content of a
metadata file, as `read_verified` returns it.
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

# Modules that run a plan, by the target it was built for. The lean runtime runs version-compatible plans only.
LIBRARIES = {"tensorrt": ("tensorrt",), "tensorrt-rtx": ("tensorrt_rtx",)}
LEAN = "tensorrt_lean"
# File name of a short-query plan, also of a rejected one: drn.fp16.8.engine takes queries of at most 8 tokens.
_SHORT = re.compile(r"\.(?P<tokens>[0-9]{1,9})(?P<rest>(\.rejected)?\.engine)\Z")


@dataclasses.dataclass(frozen=True)
class HostInfo:
    """The GPU and the TensorRT library of this machine.

    Attributes:
        library: name and version of the library that would run the plan, as "tensorrt 10.16.0"; None without one.
        capability: its compute capability, as "9.0".
    """

    library: str | None
    gpu: str | None
    capability: str | None
    library_error: str = ""
    gpu_error: str = ""


def libraries(content: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the modules that may run a plan, the preferred one first; empty if its target is unknown."""
    names = LIBRARIES.get(str(content.get("target", "tensorrt")), ())
    return (*names, LEAN) if names == LIBRARIES["tensorrt"] and is_version_compatible(content) else names


def is_version_compatible(content: Mapping[str, Any]) -> bool:
    """Return whether a plan is version-compatible. Such a plan contains host code, so its hash is checked first."""
    return bool(_options(content).get("version_compatible"))


def is_hardware_compatible(content: Mapping[str, Any]) -> bool:
    """Return whether a plan was built for Ampere and later GPUs instead of one GPU."""
    return bool(_options(content).get("hardware_compatible"))


def incompatibility(plan: Path, sidecar: EngineMetadata, host: HostInfo) -> str | None:
    """Return the error message if a plan cannot run on this machine; None if it can."""
    content = sidecar.content
    built_by = str(content.get("library", "an unknown library"))
    built = f"{plan.name} was built by {built_by} for {built_for_gpu(content)}"
    if host.gpu is None or host.capability is None:
        return f"{built}, but no GPU can be used ({host.gpu_error}). Run {source_onnx(plan, content)} on the CPU."
    command = rebuild_command(plan, sidecar)
    if host.library is None:
        return f"{built}, but that library cannot be imported ({host.library_error}). Install it, or run `{command}`."
    if not _same_library(built_by, host.library, is_version_compatible(content)):
        return f"{built}, but this machine has {host.library}. Install {built_by}, or run `{command}`."
    if not _supports_gpu(content, host.gpu, host.capability):
        return f"{built}, but this machine has {host.gpu} ({host.capability}). Run `{command}`."
    return None


def built_for_gpu(content: Mapping[str, Any]) -> str:
    """Return the GPUs that a plan was built for, as a phrase."""
    capabilities = content.get("compute_capabilities") or ()
    if capabilities:
        return f"compute capability {', '.join(map(str, capabilities))}"
    if is_hardware_compatible(content):
        return "Ampere and later"
    name, capability = _gpu(content)
    return f"{name} ({capability})" if name else "an unknown GPU"


def rebuild_command(plan: Path, sidecar: EngineMetadata, query_length: int = 0, *, here: bool = False) -> str:
    """Return the command that builds a plan again on the machine where it runs.

    Args:
        query_length: number of tokens of a query that the new plan must accept, if the present profiles are too short.
        here: whether to build for this GPU only, even if the plan is hardware-compatible.
    """
    # A short-query plan is rebuilt together with the plan it belongs to.
    plan, sidecar = _longer_plan(plan) or (plan, sidecar)
    content, manifest = sidecar.content, sidecar.manifest
    graphs = [name for name in manifest.sources if name.endswith(".onnx")]
    # The FP32 graph comes first, then the converted one that parts were split from.
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
    takes_queries = manifest.part in ("whole", "query")
    # For TensorRT, build_engine chooses lengths from the data unless --unroll is given.
    options["unroll"] = tuple(unrolled_steps(content)) or ((0,) if takes_queries and target == "tensorrt" else ())
    build_options = _options(content)
    options["version_compatible"] = is_version_compatible(content)
    options["hardware_compatible"] = is_hardware_compatible(content) and not here
    options["tf32"] = bool(build_options.get("tf32"))
    batch = _range(content, "batch")
    # A build for one query and more has two profiles by default.
    is_divided = takes_queries and batch is not None and batch.min == 1 < batch.max
    one_profile = is_divided and build_options.get("profiles") == 1
    options["profiles"] = 1 if one_profile else None
    options["split"] = manifest.part in ("video", "query")
    name = plan.name.replace(f".{manifest.part}.", ".query.", 1) if options["split"] else plan.name
    return command_line("export.build_engine", {**options, "output": plan.with_name(name)})


def unrolled_steps(content: Mapping[str, Any]) -> list[int]:
    """Return the maximum query lengths, in tokens, of the short-query plans that were built with a plan."""
    matches = (_SHORT.search(name) for name in content.get("unrolled") or ())
    return sorted(int(match["tokens"]) for match in matches if match)


def _longer_plan(plan: Path) -> tuple[Path, EngineMetadata] | None:
    """Return the plan that a short-query plan belongs to; None for other plans, or if that file is missing."""
    longer = plan.with_name(_SHORT.sub(r"\g<rest>", plan.name))
    with contextlib.suppress(ModelFileError, OSError):
        if longer != plan and plan.name in read_verified(longer).get("unrolled", ()):
            return longer, read_sidecar(longer)
    return None


def _same_library(built_by: str, installed: str, version_compatible: bool) -> bool:
    """Return whether the installed library runs a plan: the same version, or a newer one of the same major version."""
    if built_by == installed:
        return True
    (name, _, version), (installed_name, _, installed_version) = built_by.partition(" "), installed.partition(" ")
    if not version_compatible or {name, installed_name} - {"tensorrt", LEAN}:
        return False
    required, actual = _numbers(version), _numbers(installed_version)
    return bool(required) and required[:1] == actual[:1] and actual >= required


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdigit()]


def _supports_gpu(content: Mapping[str, Any], gpu: str, capability: str) -> bool:
    capabilities = content.get("compute_capabilities") or ()
    if capabilities:
        return capability in capabilities
    if is_hardware_compatible(content):
        return _numbers(capability) >= [8, 0]
    name, built_for = _gpu(content)
    return name is None or (name, built_for) == (gpu, capability)


def _gpu(content: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Return name and compute capability from the recorded line: name, CUDA version, memory, capability."""
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
    """Return the path of the ONNX file that a plan was built from, in the same directory."""
    hashes = content.get("sha256")
    names = [name for name in hashes if name.endswith(".onnx")] if isinstance(hashes, Mapping) else []
    return plan.with_name(names[0]) if names else plan.with_suffix(".onnx")
