"""Choose what is fastest on this machine: `--precision auto` and `--target cpu` of `export.build_engine`."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from export.build.build_config import BuildRequest
from export.build.run_build import EngineBuild, check_faster, run, run_with_speed
from runtime.artifacts.manifest import LIBRARIES
from runtime.backends.openvino_session import import_openvino
from runtime.core.errors import CheckFailed, DeviceError, GroundingError

log = logging.getLogger("drn")


def run_fastest(options: Mapping[str, Any]) -> Path:
    """Build the fastest model that is accurate, and return its path.

    The target cpu compares ONNX Runtime and OpenVINO. The precision auto compares INT8 with the FP16 engine, or on a
    CPU with the FP32 graph.

    Args:
        options: options of the command by name.

    Raises:
        GroundingError: an input is missing, or options contradict each other.
        CheckFailed: a check of the FP16 engine, or of every model, failed; with --precision int8 also if no model is
            faster than FP32.
    """
    requests = _requests(options)
    if options["output"] is not None:
        raise GroundingError(
            "--output does not apply to --precision auto and --target cpu, which name each file themselves. Remove the "
            "option.",
            code="inapplicable_option",
        )
    if options["min_speedup"] == 0:
        raise GroundingError(
            "--min-speedup 0 turns timing off, but --precision auto and --target cpu choose by time. Remove the "
            "option.",
            code="inapplicable_option",
        )
    # Every build is resolved before the first runs, because a library may be missing.
    build, *_ = [EngineBuild.from_request(request) for request in requests]
    if build.is_extractor:
        raise GroundingError(
            f"--precision auto and --target cpu do not apply to a feature extractor such as {requests[0].model.name}. "
            "Choose both.",
            code="inapplicable_option",
        )
    if options["dry_run"]:
        outputs = [run(request) for request in requests]
        return outputs[0]
    output = _fastest(build, requests, options["precision"] == "auto")
    if options["data"] is None:
        print(f"Fastest: {output.name}. Its accuracy was not checked; pass --data to check it.")
    else:
        print(f"Fastest within --max-drop {options['max_drop']:g}: {output.name}.")
    print(output)
    return output


def _requests(options: Mapping[str, Any]) -> list[BuildRequest]:
    """Return the builds to compare, without those of the baseline."""
    if options["target"] != "cpu":
        return [BuildRequest(**{**options, "precision": "int8"})]
    if options["precision"] not in ("int8", "auto"):
        raise DeviceError(
            f"Expected --precision int8 or auto for --target cpu, got {options['precision']}. Correct the option.",
            code="precision_unsupported",
        )
    libraries = LIBRARIES
    try:
        import_openvino()
    except DeviceError as error:
        log.warning("OpenVINO is not compared. %s", error)
        libraries = LIBRARIES[:1]
    return [BuildRequest(**{**options, "precision": "int8", "target": library}) for library in libraries]


def _fastest(build: EngineBuild, requests: list[BuildRequest], has_baseline: bool) -> Path:
    """Run the builds, and return the path of the fastest model.

    Args:
        build: the first of the builds.
        has_baseline: whether a model of higher precision is used unless INT8 is proven to be faster.
    """
    best = _baseline(build, requests[0]) if has_baseline else None
    best_speed, best_score, table = None, -1.0, requests[0].table
    failure: CheckFailed | None = None
    for request in requests:
        try:
            output, speed = run_with_speed(dataclasses.replace(request, table=table))
        except CheckFailed as error:
            print(f"INT8 is not used: {error}")
            failure = error
        else:
            score = speed.score if speed else 0.0
            is_eligible = not has_baseline or (speed is not None and speed.verdict == "faster")
            if is_eligible and score > best_score:
                best, best_speed, best_score = output, speed, score
        # Ranges do not depend on the library.
        written = build.job.sibling_path("calibration.json")
        table = table or (written if written.is_file() else None)
    if best is None:
        assert failure is not None
        raise failure
    check_faster(best, best_speed)
    return best


def _baseline(build: EngineBuild, request: BuildRequest) -> Path:
    """Return the path of the model that INT8 replaces: the FP32 graph on a CPU, else the FP16 engine."""
    if not build.job.library:
        return run(dataclasses.replace(request, precision="fp16", table=None, plan=None))
    source = build.with_source_graph().source
    assert source is not None
    return source
