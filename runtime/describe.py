"""`python -m runtime.describe`: print the content of a model file."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from runtime.artifacts import extractor_manifest
from runtime.artifacts.engine_layers import layer_stats_of_file, layers_path, read_layers_file
from runtime.artifacts.engine_metadata import read_sidecar, read_verified
from runtime.artifacts.extractor_manifest import ExtractorManifest
from runtime.artifacts.manifest import METADATA_KEY, Manifest
from runtime.artifacts.onnx_metadata import check, read_metadata
from runtime.backends import engine_compatibility
from runtime.backends.exact_int8 import weights_in_file, weights_text
from runtime.backends.model_manifest import read_manifest
from runtime.core.cli import command, suggest_next_command
from runtime.core.errors import ModelFileError
from runtime.core.io.input_files import read_json
from runtime.core.io.text_files import parse_json
from runtime.doctor import gpus
from runtime.media import extractors


def describe(
    model: Annotated[Path, tyro.conf.Positional], *, json_output: Annotated[bool, tyro.conf.arg(name="json")] = False
) -> dict[str, Any]:
    """Print what a model file contains: network, features, decoding, vocabulary and origin.

    Example:
        python -m runtime.describe drn.onnx

    Args:
        model: .onnx, .pt or .engine file of a model, or .onnx or .engine file of an extractor. An engine must match
            its metadata file.
        json_output: print the complete manifest as JSON, including the vocabulary.
    """
    extractor = _extractor(model)
    if extractor:
        return _describe_extractor(model, *extractor, json_output)
    sidecar = read_sidecar(model) if model.suffix == ".engine" and model.is_file() else None
    manifest = sidecar.manifest if sidecar else read_manifest(model)
    content = dict(sidecar.content) if sidecar else manifest.to_dict()
    if json_output:
        print(json.dumps(content, indent=2))
        return content
    rows = _model_rows(model, manifest)
    weights = weights_in_file(model) if model.suffix == ".onnx" else {}
    if weights:
        rows.append(("weights", weights_text(weights)))
    if sidecar:
        rows += _engine_rows(model, sidecar.content)
    elif model.suffix == ".onnx":
        recorded = check(model).recorded
        rows.append(("digest", "of weights, graph and manifest: valid" if recorded else "not recorded"))
    _print_rows(rows)
    runnable = _runnable(model, sidecar.content if sidecar else None)
    if runnable.suffix == ".onnx" and manifest.precision == "bf16":
        suggest_next_command("runtime.doctor")
        return content
    words = ("--model", runnable, "--data", "DIR", "--video", "NAME", "--query", "a sentence")
    suggest_next_command("runtime.infer", *words)
    return content


def _print_rows(rows: Sequence[tuple[str, str]]) -> None:
    width = max(len(label) for label, _ in rows)
    print("\n".join(f"{label:<{width}}  {value}" for label, value in rows))


def _runnable(model: Path, engine_content: Mapping[str, Any] | None) -> Path:
    """Return the model, or the ONNX model that an engine was built from if this machine has no GPU."""
    if engine_content is None or gpus()[0].works:
        return model
    return engine_compatibility.source_onnx(model, engine_content)


def _model_rows(model: Path, manifest: Manifest) -> list[tuple[str, str]]:
    """Return labels and texts of the manifest of a model."""
    features, decoding = manifest.features, manifest.decoding
    nms = {"mmaction2": "soft-NMS", "drn": "hard NMS"}[decoding.protocol]
    score = "matching x IoU" if decoding.use_iou_scores else "matching"
    rows = [
        ("file", f"{model.name}, {model.stat().st_size / 2**20:.1f} MiB"),
        ("network", f"DRN after training stage {manifest.stage}, {manifest.precision}"),
        *((("library", "OpenVINO, on a CPU"),) if manifest.library == "openvino" else ()),
        (
            "input",
            f"{features.kind} features of width {features.dim}, "
            f"{features.window} frames per clip, one clip every {features.stride} frames",
        ),
        ("segments", f"{decoding.num_segments}, pooled as in {features.pooling}; {decoding.num_locations} locations"),
        (
            "queries",
            f"1 to {manifest.max_query_length} tokens of {len(manifest.vocabulary)} words; "
            f"unknown words: {manifest.vocabulary.unknown}",
        ),
        ("decoding", f"{score} above {decoding.score_threshold:g}, {nms} ({decoding.protocol} protocol)"),
        *([("moments", f"in the graph too: {manifest.moments}")] if manifest.moments else ()),
        ("long videos", str(manifest.windows or "grounded without windows")),
        ("no match", str(manifest.presence or "not detected: every query gets moments")),
        *((f"source {name}", digest) for name, digest in manifest.sources.items()),
        ("created with", ", ".join(f"{name} {version}" for name, version in manifest.producer.items()) or "-"),
        ("training", json.dumps({key: value for key, value in manifest.training.items() if key != "validation"})),
    ]
    validation = manifest.training.get("validation")
    scores = ", ".join(
        f"{key} {100 * value:.2f}"
        for key, value in (validation.items() if isinstance(validation, Mapping) else ())
        if key.startswith(("R@", "mIoU")) and isinstance(value, float)
    )
    if scores:
        rows.append(
            ("validation", scores + (" (simulated features)" if manifest.training.get("simulated_features") else ""))
        )
    return rows


def _extractor(path: Path) -> tuple[ExtractorManifest, Mapping[str, Any]] | None:
    """Return the manifest of an extractor and the content of its file to print; None for other files."""
    content: Mapping[str, Any] | None = None
    manifest: Any = None
    if path.suffix == ".engine" and path.is_file():
        content = read_verified(path)
        manifest = content["manifest"]
    elif path.suffix == ".onnx" and path.is_file():
        description, metadata = extractors.description_path(path), {METADATA_KEY: ""}
        with contextlib.suppress(ModelFileError):
            metadata = read_metadata(path)
            manifest = parse_json(metadata.get(extractor_manifest.METADATA_KEY, "null"), str(path), ModelFileError)
        if not {METADATA_KEY, extractor_manifest.METADATA_KEY} & metadata.keys() and description.is_file():
            manifest = read_json(description, "description of an extractor", ModelFileError)
    if not isinstance(manifest, dict) or manifest.get("format") != extractor_manifest.FORMAT:
        return None
    if path.suffix == ".onnx":
        described = {} if extractor_manifest.METADATA_KEY in metadata else manifest
        extractors.check_description(described, path, check(path))
    return ExtractorManifest.from_dict(manifest, str(path)), content or manifest


def _describe_extractor(
    path: Path, manifest: ExtractorManifest, content: Mapping[str, Any], json_output: bool
) -> dict[str, Any]:
    if json_output:
        print(json.dumps(content, indent=2))
        return dict(content)
    resized = manifest.resize if isinstance(manifest.resize, int) else " x ".join(map(str, manifest.resize))
    rows = [
        ("file", f"{path.name}, {path.stat().st_size / 2**20:.1f} MiB"),
        ("network", f"{manifest.kind}, an extractor of clip features, {manifest.precision}"),
        ("input", f"{manifest.window} frames per clip, one clip every {manifest.stride} frames"),
        ("frames", f"resized to {resized}, center crop of {' x '.join(map(str, manifest.crop))}, RGB"),
        ("output", f"features of width {manifest.dim}"),
        *((f"source {name}", digest) for name, digest in manifest.sources.items()),
    ]
    is_engine = path.suffix == ".engine"
    if is_engine:
        rows += _engine_rows(path, content)
    _print_rows(rows)
    extractor = _runnable(path, content if is_engine else None)
    suggest_next_command("runtime.extract", "VIDEO", "--extractor", extractor, "--output", "DIR")
    return dict(content)


def _engine_rows(engine: Path, content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return labels and texts of an engine's metadata beyond the manifest, and of its layers file."""
    shares = content.get("census", {}).get("twin", {}).get("shares", {})
    counted = ", ".join(f"{100 * share:.1f} % {kind}" for kind, share in shares.items())
    built_for = ", ".join(content.get("compute_capabilities", ())) or content.get("gpu") or "unknown"
    rows = [
        ("built with", f"{content.get('library')}, for {built_for}"),
        ("precision", f"{counted} of the multiply-adds of its ONNX model"),
    ]
    stats = content.get("census", {})
    if "verdict" in stats:
        rows.append(("in the engine", f"{stats['verdict']}: {stats['reason']}"))
    rows += _layer_rows(engine, content)
    for profile in content.get("profiles", ()):
        sizes = [" ".join(map(str, profile[name])) for name in ("batch", "query_length")]
        rows.append((f"profile: {profile['name']}", f"batch {sizes[0]}, query length {sizes[1]} (min opt max)"))
    steps = engine_compatibility.unrolled_steps(content)
    if steps:
        rows.append(("unrolled", f"separate engines for queries of at most {' and '.join(map(str, steps))} tokens"))
    return rows


def _layer_rows(engine: Path, content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return a row per profile of the layers file, the inspector's JSON; no rows without the file."""
    path = layers_path(engine)
    if not path.is_file():
        return []
    try:
        layers = read_layers_file(path)
    except ModelFileError as error:
        return [("layers", str(error))]
    if layers.get("sha256") != content["sha256"].get(engine.name):
        return [("layers", f"{path.name} belongs to another build of {engine.name}")]
    return [
        (f"layers: {name}", f"that multiply: {counted}" if counted else f"not described in {path.name}")
        for name, counted in layer_stats_of_file(layers)
    ]


if __name__ == "__main__":
    command(describe)
