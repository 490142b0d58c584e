"""`python -m export.triton`: a model repository that Triton Inference Server loads."""

from __future__ import annotations

import logging
from pathlib import Path

from export.engine.profiles import DEFAULT_BATCH
from export.triton_repository.model_config import Kind, ServingOptions, build_models, read_model
from export.triton_repository.writer import write
from runtime.core.cli import command, suggest_next_command

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
    """Write a model repository for Triton: the network, and a front that takes sentences and clip features and returns
    moments. A model that is there already gets a new version.

    Args:
        model: .onnx or .engine file; of a split model the query part, and videos are encoded once.
        output: directory of the repository; other models in it stay as they are.
        name: what clients call the front; the networks are named after it.
        device: where the network of an .onnx file runs; auto takes a GPU if Triton sees one.
        batch: most queries that go through an .onnx file together; an engine has its own.
        instances: processes of the front.
        wait_ms: how long the first of a batch of requests waits for others.
        threads: CPU threads for an .onnx file.
    """
    serving = ServingOptions(name, device, batch, instances, wait_ms, threads)
    parts = build_models(read_model(model, serving), serving)
    version = write(output, parts, model)
    for part in parts:
        files = ", ".join(f"{version}/{file}" for file in part.files)
        print(f"{output / part.name}: config.pbtxt, {files}")
    log.info("Serve it:  tritonserver --model-repository %s  (in a container with drn-deploy: docs/triton.md)", output)
    address = f"triton://localhost:8001/{name}"
    suggest_next_command(
        "runtime.infer", "--model", address, "--data", "DIR", "--video", "NAME", "--query", "a sentence"
    )
    return output


if __name__ == "__main__":
    command(triton)
