"""Choose the precision that is fastest on this machine: `--precision auto` of `export.build_engine`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from export.build.build_config import BuildRequest
from export.build.run_build import EngineBuild, run, run_with_speed
from runtime.core.errors import CheckFailed, GroundingError


def run_fastest(options: Mapping[str, Any]) -> Path:
    """Build the fastest model that is accurate, and return its path.

    That is the INT8 model if it is faster on this machine; else the FP16 engine, or on a CPU the FP32 graph.

    Args:
        options: options of the command by name, without the precision.

    Raises:
        GroundingError: an input is missing, or options contradict each other.
        CheckFailed: a check of the FP16 engine failed.
    """
    quantized, half = (BuildRequest(**{**options, "precision": precision}) for precision in ("int8", "fp16"))
    if quantized.output is not None:
        raise GroundingError(
            "--output does not apply to --precision auto, which names each file by its precision. Remove the option.",
            code="inapplicable_option",
        )
    build = EngineBuild.from_request(quantized)
    if build.is_extractor:
        raise GroundingError(
            f"--precision auto does not apply to a feature extractor such as {quantized.model.name}. "
            "Choose a precision.",
            code="inapplicable_option",
        )
    if quantized.dry_run:
        return run(quantized)
    if build.job.library:
        other = build.with_source_graph().source
        assert other is not None
    else:
        half = dataclasses.replace(half, table=None, plan=None)
        other = run(half)
    try:
        output, speed = run_with_speed(quantized)
    except CheckFailed as error:
        print(f"INT8 is not used: {error}")
        output, speed = other, None
    else:
        if speed is None or speed.verdict != "faster":
            output = other
    print(f"Fastest within --max-drop {quantized.max_drop:g}: {output.name}.")
    print(output)
    return output
