"""`python -m runtime.describe`: what a model file is."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro

from runtime.artifacts import extractor_manifest
from runtime.artifacts.engine_layers import layer_stats_of_file, layers_path, read_layers_file
from runtime.artifacts.engine_metadata import read_sidecar, read_verified
from runtime.artifacts.extractor_manifest import ExtractorManifest
from runtime.artifacts.manifest import METADATA_KEY, Manifest
from runtime.artifacts.onnx_metadata import MISMATCH, check, read_metadata
from runtime.backends import engine_compatibility, open_backend
from runtime.backends.exact_int8 import weights_in_file, weights_text
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

    Args:
        model: .onnx, .pt or .engine file of a model, or .onnx or .engine file of an extractor. An engine is
            described by its metadata file, after a check that both belong together.
        json_output: print the whole manifest as JSON, vocabulary included.
    """
    extractor = _extractor(model)
    if extractor:
        return _describe_extractor(model, *extractor, json_output)
    sidecar = read_sidecar(model) if model.suffix == ".engine" and model.is_file() else None
    manifest = sidecar.manifest if sidecar else _manifest(model)
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
        rows.append(("digest", "of weights, graph and manifest: checked" if recorded else "not recorded"))
    width = max(len(label) for label, _ in rows)
    print("\n".join(f"{label:<{width}}  {value}" for label, value in rows))
    # Where no GPU runs an engine, the twin beside it answers alike.
    runs = model if not sidecar or gpus()[0].works else engine_compatibility.source_onnx(model, sidecar.content)
    if runs.suffix == ".onnx" and manifest.precision == "bf16":
        suggest_next_command("runtime.doctor")
        return content
    suggest_next_command("runtime.infer", "--model", runs, "--data", "DIR", "--video", "NAME", "--query", "a sentence")
    return content


def _model_rows(model: Path, manifest: Manifest) -> list[tuple[str, str]]:
    """Return labels and texts of what the manifest of a model records."""
    features, decoding = manifest.features, manifest.decoding
    nms = {"mmaction2": "soft-NMS", "drn": "hard NMS"}[decoding.protocol]
    score = "matching x IoU" if decoding.use_iou_scores else "matching"
    rows = [
        ("file", f"{model.name}, {model.stat().st_size / 2**20:.1f} MiB"),
        ("network", f"DRN after training stage {manifest.stage}, {manifest.precision}"),
        (
            "takes",
            f"{features.kind} features of width {features.dim}, "
            f"{features.window} frames a clip, one every {features.stride}",
        ),
        ("segments", f"{decoding.num_segments}, pooled as in {features.pooling}; {decoding.num_locations} locations"),
        (
            "queries",
            f"1 to {manifest.max_query_length} tokens of {len(manifest.vocabulary)} words; "
            f"unknown words: {manifest.vocabulary.unknown}",
        ),
        ("decoding", f"{score} above {decoding.score_threshold:g}, {nms} ({decoding.protocol} protocol)"),
        ("long videos", str(manifest.windows or "grounded whole")),
        ("no moment found", str(manifest.presence or "never said: it always answers")),
        *((f"source {name}", digest) for name, digest in manifest.sources.items()),
        ("made with", ", ".join(f"{name} {version}" for name, version in manifest.producer.items()) or "-"),
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
    """Return what is said of an extractor, in it or beside it, alone and with other metadata; None for other files."""
    content: Mapping[str, Any] | None = None
    about: Any = None
    if path.suffix == ".engine" and path.is_file():
        content = read_verified(path)
        about = content["manifest"]
    elif path.suffix == ".onnx" and path.is_file():
        siblings, metadata = path.with_name(f"{path.name}.json"), {METADATA_KEY: ""}
        with contextlib.suppress(ModelFileError):
            metadata = read_metadata(path)
            about = parse_json(metadata.get(extractor_manifest.METADATA_KEY, "null"), str(path), ModelFileError)
        if not {METADATA_KEY, extractor_manifest.METADATA_KEY} & metadata.keys() and siblings.is_file():
            about = read_json(siblings, "description of an extractor", ModelFileError)
    if not isinstance(about, dict) or about.get("format") != extractor_manifest.FORMAT:
        return None
    if path.suffix == ".onnx":
        extractors.check_description({} if extractor_manifest.METADATA_KEY in metadata else about, path, check(path))
    return ExtractorManifest.from_dict(about, str(path)), content or about


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
        ("takes", f"{manifest.window} frames a clip, one every {manifest.stride}"),
        ("frames", f"resized to {resized}, the middle {' x '.join(map(str, manifest.crop))} cut out, RGB"),
        ("gives", f"features of width {manifest.dim}"),
        *((f"source {name}", digest) for name, digest in manifest.sources.items()),
    ]
    runs = path
    if path.suffix == ".engine":
        rows += _engine_rows(path, content)
        runs = path if gpus()[0].works else engine_compatibility.source_onnx(path, content)
    width = max(len(label) for label, _ in rows)
    print("\n".join(f"{label:<{width}}  {value}" for label, value in rows))
    suggest_next_command("runtime.extract", "VIDEO", "--extractor", runs, "--output", "DIR")
    return dict(content)


def _manifest(model: Path) -> Manifest:
    """Return what a model file says of itself, also of a graph in a precision that ONNX Runtime has no kernels for."""
    try:
        return open_backend(model, "cpu").manifest
    except ModelFileError as error:
        if error.code == MISMATCH:
            raise
        with contextlib.suppress(ModelFileError):
            manifest = Manifest.from_json(read_metadata(model).get(METADATA_KEY), str(model))
            if model.suffix == ".onnx" and manifest.precision == "bf16":
                return manifest
        raise


def _engine_rows(engine: Path, content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what an engine's metadata contains beyond the manifest, and what its layers file shows."""
    shares = content.get("census", {}).get("twin", {}).get("shares", {})
    counted = ", ".join(f"{100 * share:.1f} % {kind}" for kind, share in shares.items())
    built_for = ", ".join(content.get("compute_capabilities", ())) or content.get("gpu") or "unknown"
    rows = [
        ("built with", f"{content.get('library')}, for {built_for}"),
        ("precision", f"{counted} of the multiply-adds of its twin"),
    ]
    stats = content.get("census", {})
    if "verdict" in stats:
        rows.append(("in the engine", f"{stats['verdict']}: {stats['reason']}"))
    rows += _layer_rows(engine, content)
    for profile in content.get("profiles", ()):
        sizes = [" ".join(map(str, profile[name])) for name in ("batch", "query_length")]
        rows.append(
            (f"profile: {profile['name']}", f"batch {sizes[0]}, query length {sizes[1]} (smallest best largest)")
        )
    steps = engine_compatibility.unrolled_steps(content)
    if steps:
        rows.append(("unrolled", f"queries of at most {' and '.join(map(str, steps))} tokens have a plan of their own"))
    return rows


def _layer_rows(engine: Path, content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what the inspector's JSON beside an engine shows, a row for each profile; none where there is no such
    file."""
    path = layers_path(engine)
    if not path.is_file():
        return []
    try:
        layers = read_layers_file(path)
    except ModelFileError as error:
        return [("layers", str(error))]
    if layers.get("sha256") != content["sha256"].get(engine.name):
        return [("layers", f"{path.name} is of another build of {engine.name}")]
    return [
        (f"layers: {name}", f"that multiply: {counted}" if counted else f"not described in {path.name}")
        for name, counted in layer_stats_of_file(layers)
    ]


if __name__ == "__main__":
    command(describe)
