"""Write a model repository for Triton Inference Server: `python -m export.triton`."""

from __future__ import annotations

import logging
from pathlib import Path

from export.engine.profiles import DEFAULT_BATCH
from export.triton.model_config import Kind, ServingOptions, build_models, read_model
from export.triton.writer import write
from runtime.core.cli import report_written, suggest_next_command

log = logging.getLogger("drn")


def triton(
    model: Path,
    output: Path,
    *,
    name: str = "drn",
    device: Kind = "auto",
    batch: int = DEFAULT_BATCH[2],
    instances: int = 2,
    wait_ms: float = 1.0,
    threads: int | None = None,
) -> Path:
    """Write a model repository for Triton Inference Server.

    The repository contains the network and a front model that takes sentences and clip features and returns
    moments. A model that already exists gets a new version.

    Args:
        model: .onnx or .engine file. For a split model give the query part, so that each video is encoded once.
        output: directory of the repository; other models in it are preserved.
        name: name of the front model; the names of the networks start with it.
        device: device of an .onnx network; auto uses a GPU if Triton has one.
        batch: maximum batch size of an .onnx network. The batch size of an engine is fixed by its profiles.
        instances: number of processes of the front model.
        wait_ms: maximum time that the first request of a batch waits for further requests, in ms.
        threads: number of CPU threads of an .onnx network. Default: set by ONNX Runtime.

    Returns:
        `output`.

    Raises:
        ModelFileError: Triton cannot run the model.
        OutputError: the repository cannot be written, or has another model with the same name.
    """
    serving = ServingOptions(name, device, batch, instances, wait_ms, threads)
    parts = build_models(read_model(model, serving), serving)
    version, files = write(output, parts, model)
    for part in parts:
        print(f"{output / part.name}: version {version}")
    report_written(*(output / file for file in files))
    log.info("Start the server with:  tritonserver --model-repository %s  (container: docs/triton.md)", output)
    address = f"triton://localhost:8001/{name}"
    suggest_next_command(
        "runtime.infer", "--model", address, "--data", "DIR", "--video", "NAME", "--query", "a sentence"
    )
    return output
