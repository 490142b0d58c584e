"""Build the Triton configuration of each model.

The fields are those of `ModelConfig` in model_config.proto of triton-inference-server/common.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

import runtime.triton
from calib.graph.onnx_graph import manifest_in
from export.engine.profiles import DEFAULT_BATCH, DEFAULT_CACHED_VIDEOS, MAX_ENCODE_BATCH
from runtime.artifacts.engine_metadata import read_sidecar
from runtime.artifacts.manifest import Manifest
from runtime.artifacts.onnx_metadata import check
from runtime.backends import engine_compatibility, triton_protocol
from runtime.backends.base import check_answers_queries
from runtime.backends.batch_shapes import MinOptMax, padded_length
from runtime.backends.onnx_backend import locate_part
from runtime.backends.tensorrt_backend import locate_video_part
from runtime.backends.triton_backend import FORMAT, PARAMETER, FrontConfig
from runtime.core.batch import ENCODED_FEATURES, VIDEO_INDEX
from runtime.core.errors import DeviceError, GroundingError, ModelFileError, check_option, excerpt
from runtime.core.io.digests import sha256
from runtime.core.io.input_files import check_file

Kind = Literal["auto", "cpu", "cuda"]
KINDS = {"auto": "KIND_AUTO", "cpu": "KIND_CPU", "cuda": "KIND_GPU"}
FORMAT_PARAMETER = "drn.format"
# File suffix -> platform, backend, file name in a version directory.
PLATFORMS = {
    ".onnx": ("onnxruntime_onnx", "onnxruntime", "model.onnx"),
    ".engine": ("tensorrt_plan", "tensorrt", "model.plan"),
}
Shapes = Mapping[str, Sequence[int]]


@dataclasses.dataclass(frozen=True)
class ServingOptions:
    """The options of `python -m export.triton`, which documents each."""

    name: str = "drn"
    device: Kind = "auto"
    batch: int = DEFAULT_BATCH[2]
    instances: int = 2
    wait_ms: float = 1.0
    threads: int | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", self.name):
            raise GroundingError(
                f"Expected --name of letters, digits, - and _ with a letter first, got {excerpt(self.name)}. "
                "Correct the option.",
                code="invalid_option",
            )
        check_option("--batch", self.batch, 1)
        check_option("--instances", self.instances, 1)
        check_option("--threads", self.threads, 1)
        check_option("--wait-ms", self.wait_ms, 0, 1000)


@dataclasses.dataclass(frozen=True)
class TritonModel:
    """One model of the repository.

    Attributes:
        config: `ModelConfig` in its JSON form.
        files: files of a version by name: the path of a file to copy, or text.
        warmup: inputs of the warm-up request that Triton runs before a version is ready, by file name.
    """

    config: Mapping[str, Any]
    files: Mapping[str, Path | str]
    warmup: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        """Return the name of the model in the repository."""
        return str(self.config["name"])


@dataclasses.dataclass(frozen=True)
class SourceModel:
    """A model file and its limits.

    Attributes:
        manifest: manifest of the model, with the maximum query length of the file.
        batch: min, opt and max number of queries.
        query_length: min, opt and max number of tokens.
        path: file of the full network or the query part.
        video: file of the video part; None for a full network.
        encoded: shape (D, T) and Triton data type of an encoded video.
        videos: maximum number of encoded videos per request of the query part.
        max_encode_batch: maximum batch size of the video part.
        profiles: number of optimization profiles of the engine (full or query part) and of that of the video part.
    """

    manifest: Manifest
    batch: MinOptMax
    query_length: MinOptMax
    path: Path
    video: Path | None = None
    encoded: tuple[tuple[int, int], str] = ((0, 0), "TYPE_FP32")
    videos: int = DEFAULT_CACHED_VIDEOS
    max_encode_batch: int = MAX_ENCODE_BATCH
    profiles: tuple[int, int] = (1, 1)

    @property
    def is_engine(self) -> bool:
        """Return whether the file is a TensorRT engine."""
        return self.path.suffix == ".engine"


def read_model(path: Path, serving: ServingOptions) -> SourceModel:
    """Read a model file and its limits.

    Args:
        path: .onnx or .engine file; for a split model the query part.
        serving: options of serving, of which the device and the batch size are used.

    Raises:
        ModelFileError: the file is not a DRN model, or Triton cannot run it.
        DeviceError: the model does not run on the requested device.
    """
    if path.suffix not in PLATFORMS:
        raise ModelFileError(
            f"Expected a model with the suffix .onnx or .engine, got {excerpt(path.name)}. "
            "Export a checkpoint with `python -m export.to_onnx`.",
            code="wrong_suffix",
        )
    check_file(path, "The model file", ModelFileError)
    if path.suffix == ".engine" and serving.device == "cpu":
        raise DeviceError(
            f"{path.name} is an engine and needs a GPU. Remove --device, or give the .onnx file.",
            code="gpu_required",
        )
    source = _read_engine(path) if path.suffix == ".engine" else _read_graph(path, serving)
    if source.encoded[1] == "TYPE_BF16":
        raise ModelFileError(
            f"The parts of {path.name} exchange bfloat16, which Triton's Python backend does not support. "
            "Give the engine of the full model, or build the parts in fp16.",
            code="precision_unsupported",
        )
    return source


def _read_graph(path: Path, serving: ServingOptions) -> SourceModel:
    manifest = manifest_in(path)
    _check_part(path, manifest)
    if manifest.precision == "bf16":
        raise ModelFileError(
            f"ONNX Runtime has no bf16 kernels to run {path.name}. Give its .engine, or a model in fp16.",
            code="precision_unsupported",
        )
    if manifest.library == "openvino":
        raise ModelFileError(
            f"{path.name} was built for OpenVINO, which the repository does not run. Build it with `python -m "
            "export.build_engine --target onnxruntime`.",
            code="target_unsupported",
        )
    longest = manifest.max_query_length
    # The typical query of the supported data sets has eight tokens.
    source = SourceModel(
        manifest, MinOptMax(1, min(8, serving.batch), serving.batch), MinOptMax(1, min(8, longest), longest), path
    )
    if manifest.part == "whole":
        return source
    ((name, digest),) = manifest.video_part.items()
    video = locate_part(path, name, digest)
    return dataclasses.replace(source, video=video, encoded=_encoded(video))


def _read_engine(path: Path) -> SourceModel:
    sidecar = read_sidecar(path)
    content, manifest = sidecar.content, sidecar.manifest
    _check_part(path, manifest)
    if content.get("target", "tensorrt") != "tensorrt":
        raise ModelFileError(
            f"{path.name} was built for {content['target']}, which Triton does not support. Build it with "
            "`python -m export.build_engine --target tensorrt`, or give the .onnx file.",
            code="target_unsupported",
        )
    batch, query_length = (
        MinOptMax.covering(profile[name] for profile in content["profiles"]) for name in ("batch", "query_length")
    )
    longest = min(query_length.max, manifest.max_query_length)
    manifest = dataclasses.replace(manifest, max_query_length=longest)
    source = SourceModel(manifest, batch, query_length, path, profiles=(len(content["profiles"]), 1))
    if manifest.part == "whole":
        return source
    video, video_sidecar = locate_video_part(path, sidecar)
    shapes = content["profiles"][-1]["shapes"][ENCODED_FEATURES]
    channels, segments = shapes[2][1:]
    video_profiles = video_sidecar.content["profiles"]
    return dataclasses.replace(
        source,
        video=video,
        # All inputs and outputs of a TensorRT 8.6 engine are float32.
        encoded=_encoded(engine_compatibility.source_onnx(video, video_sidecar.content))
        if content.get("strongly_typed", True)
        else ((channels, segments), "TYPE_FP32"),
        videos=shapes[2][0],
        max_encode_batch=max(int(each["shapes"]["segment_features"][2][0]) for each in video_profiles),
        profiles=(len(content["profiles"]), len(video_profiles)),
    )


def _check_part(path: Path, manifest: Manifest) -> None:
    check_answers_queries(path, manifest)
    if manifest.moments:
        raise ModelFileError(
            f"{path} contains decoding and NMS, which the front of the repository computes. Give the .onnx file "
            "without them, which `python -m export.to_onnx` wrote too.",
            code="contains_moments",
        )


def _encoded(video: Path) -> tuple[tuple[int, int], str]:
    """Return shape (D, T) and Triton data type of the output of a video part."""
    import onnx

    check_file(video, "The graph of the video part", ModelFileError)
    check(video)
    (output,) = onnx.load(video, load_external_data=False).graph.output
    kinds = onnx.TensorProto
    names = {kinds.FLOAT: "TYPE_FP32", kinds.FLOAT16: "TYPE_FP16", kinds.BFLOAT16: "TYPE_BF16"}
    _, channels, segments = (dimension.dim_value for dimension in output.type.tensor_type.shape.dim)
    return (channels, segments), names[output.type.tensor_type.elem_type]


def build_models(source: SourceModel, serving: ServingOptions) -> list[TritonModel]:
    """Return the models of a repository: the networks, then the front model that calls them."""
    if source.video is None:
        network, video = f"{serving.name}_network", ""
        networks = [_single_model(source, serving, network)]
    else:
        network, video = f"{serving.name}_query", f"{serving.name}_video"
        networks = _split_models(source, serving, video, network)
    files = {
        f"{part.name}/{name}": sha256(path)
        for part in networks
        for name, path in part.files.items()
        if isinstance(path, Path)
    }
    front = FrontConfig(
        source.manifest, network, video, source.batch.max, source.videos, source.max_encode_batch, files
    )
    return [*networks, _front_model(front, serving)]


def _front_model(front: FrontConfig, serving: ServingOptions) -> TritonModel:
    def tensor(name: str, kind: str, *dims: int, optional: bool = False) -> dict[str, Any]:
        # Requests of different shapes share a batch: the front pads the inputs of the network.
        entry: dict[str, Any] = {"name": name, "data_type": kind, "dims": list(dims), "allow_ragged_batch": True}
        return {**entry, "optional": True} if optional else entry

    config = {
        "name": serving.name,
        "backend": "python",
        "default_model_filename": "model.py",
        "max_batch_size": front.batch,
        "version_policy": TWO_VERSIONS,
        "input": [
            tensor(triton_protocol.QUERY, "TYPE_STRING", -1),
            tensor(triton_protocol.FEATURES, "TYPE_FP32", -1, front.manifest.features.dim),
            tensor(triton_protocol.DURATION, "TYPE_FP64", 1),
            tensor(triton_protocol.NUM_FRAMES, "TYPE_INT32", 1, optional=True),
            tensor(triton_protocol.TOP_K, "TYPE_INT32", 1, optional=True),
            tensor(triton_protocol.WINDOWS, "TYPE_FP64", 3, optional=True),
            tensor(triton_protocol.ALWAYS_ANSWER, "TYPE_BOOL", 1, optional=True),
        ],
        "output": [
            {"name": triton_protocol.MOMENTS, "data_type": "TYPE_FP64", "dims": [-1, -1, 3]},
            {"name": triton_protocol.COUNT, "data_type": "TYPE_INT32", "dims": [-1]},
        ],
        "dynamic_batching": {"max_queue_delay_microseconds": round(1000 * serving.wait_ms)},
        "instance_group": [{"kind": "KIND_CPU", "count": serving.instances}],
        "parameters": {
            FORMAT_PARAMETER: {"string_value": FORMAT},
            PARAMETER: {"string_value": front.to_json()},
        },
    }
    program = Path(runtime.triton.__file__).with_name("model.py")
    return TritonModel(config, {"model.py": program, triton_protocol.ABOUT_FILE: front.to_json() + "\n"})


# A front calls the networks of its own version, so the previous networks stay until the new front is ready.
TWO_VERSIONS = {"latest": {"num_versions": 2}}


def _single_model(source: SourceModel, serving: ServingOptions, name: str) -> TritonModel:
    segments, width = source.manifest.decoding.num_segments, source.manifest.features.dim
    _, best, largest = source.batch

    def shapes(length: int) -> Shapes:
        return {
            "query_tokens": (length,),
            "query_length": (1,),
            "segment_features": (segments, width),
            "segment_spans": (segments, 2),
        }

    graphs = [
        # Triton reshapes `query_length` to (B,) for the network.
        {"batch_size": batch, "input": _dims({**shapes(length), "query_length": ()})}
        for batch in sorted({1, best, largest})
        for length in padded_lengths(source.query_length.max)
    ]
    warmup = _warmup_values(source, shapes(padded_length(source.query_length.opt, source.query_length.max)))
    config = {
        **_network(source, serving, name, source.path, source.profiles[0]),
        "max_batch_size": largest,
        "input": [
            {"name": "query_tokens", "data_type": "TYPE_INT32", "dims": [-1]},
            # Triton requires at least one dimension, so requests have lengths of (B, 1).
            {"name": "query_length", "data_type": "TYPE_INT32", "dims": [1], "reshape": {"shape": []}},
            {"name": "segment_features", "data_type": "TYPE_FP32", "dims": [segments, width]},
            {"name": "segment_spans", "data_type": "TYPE_FP32", "dims": [segments, 2]},
        ],
        "output": _heads(source),
        "dynamic_batching": {"preferred_batch_size": sorted({best, largest})},
        "model_warmup": [_warmup(warmup, batch) for batch in sorted({1, best})],
    }
    return TritonModel(_with_cuda_graphs(config, source, graphs), _model_file(source.path), warmup)


def _split_models(source: SourceModel, serving: ServingOptions, video: str, query: str) -> list[TritonModel]:
    """Return the video part and the query part.

    The front batches requests of the query part: Triton cannot, because a request has several queries per video.
    """
    assert source.video is not None
    segments, width = source.manifest.decoding.num_segments, source.manifest.features.dim
    encoded, kind = source.encoded
    _, best, largest = source.batch

    def shapes(batch: int, length: int) -> Shapes:
        return {
            "query_tokens": (batch, length),
            "query_length": (batch,),
            VIDEO_INDEX: (batch,),
            ENCODED_FEATURES: (1, *encoded),
            "segment_spans": (1, segments, 2),
        }

    video_config = {
        **_network(source, serving, video, source.video, source.profiles[1]),
        "max_batch_size": source.max_encode_batch,
        "input": [{"name": "segment_features", "data_type": "TYPE_FP32", "dims": [segments, width]}],
        "output": [{"name": ENCODED_FEATURES, "data_type": kind, "dims": list(encoded)}],
        "dynamic_batching": {"preferred_batch_size": [source.max_encode_batch]},
        "model_warmup": [_warmup(_warmup_values(source, {"segment_features": (segments, width)}), 1)],
    }
    graphs = [
        {"batch_size": 0, "input": _dims(shapes(batch, length))}
        for batch in sorted({1, best, largest})
        for length in padded_lengths(source.query_length.max)
    ]
    warmup = _warmup_values(source, shapes(1, padded_length(source.query_length.opt, source.query_length.max)))
    query_config = {
        **_network(source, serving, query, source.path, source.profiles[0]),
        "max_batch_size": 0,
        "input": [
            {"name": "query_tokens", "data_type": "TYPE_INT32", "dims": [-1, -1]},
            {"name": "query_length", "data_type": "TYPE_INT32", "dims": [-1]},
            {"name": VIDEO_INDEX, "data_type": "TYPE_INT32", "dims": [-1]},
            {"name": ENCODED_FEATURES, "data_type": kind, "dims": [-1, *encoded]},
            {"name": "segment_spans", "data_type": "TYPE_FP32", "dims": [-1, segments, 2]},
        ],
        "output": [{**head, "dims": [-1, *head["dims"]]} for head in _heads(source)],
        "model_warmup": [_warmup(warmup, 1, {ENCODED_FEATURES: kind})],
    }
    return [
        TritonModel(_with_cuda_graphs(video_config, source, []), _model_file(source.video)),
        TritonModel(_with_cuda_graphs(query_config, source, graphs), _model_file(source.path), warmup),
    ]


def padded_lengths(longest: int) -> list[int]:
    """Return the padded query lengths, in tokens, of a network for at most `longest` tokens."""
    return sorted({padded_length(length, longest) for length in range(1, longest + 1)})


def _network(source: SourceModel, serving: ServingOptions, name: str, path: Path, profiles: int) -> dict[str, Any]:
    platform, backend, filename = PLATFORMS[path.suffix]
    group: dict[str, Any] = {"kind": KINDS[serving.device], "count": 1}
    parameters = {FORMAT_PARAMETER: FORMAT}
    if source.is_engine:
        group["kind"] = "KIND_GPU"
        # By default Triton uses only the first profile, which is for a single query.
        group["profile"] = [str(index) for index in range(profiles)]
    elif serving.threads is not None:
        parameters["intra_op_thread_count"] = str(serving.threads)
    return {
        "name": name,
        "platform": platform,
        "backend": backend,
        "default_model_filename": filename,
        "version_policy": TWO_VERSIONS,
        "instance_group": [group],
        "parameters": {key: {"string_value": value} for key, value in parameters.items()},
    }


def _with_cuda_graphs(config: dict[str, Any], source: SourceModel, specs: Sequence[Any]) -> dict[str, Any]:
    """Return the configuration of an engine with CUDA graphs for the given shapes; that of a graph unchanged.

    The shapes have no `graph_lower_bound`, because Triton would run smaller requests with uninitialized memory after
    their end, which the network would read as tokens.
    """
    if not source.is_engine:
        return config
    return {**config, "optimization": {"cuda": {"graphs": True, "graph_spec": list(specs)}}}


def _heads(source: SourceModel) -> list[dict[str, Any]]:
    locations = source.manifest.decoding.num_locations
    shapes = {"matching_logits": [locations], "boundary_distances": [locations, 2], "iou_logits": [locations]}
    return [{"name": name, "data_type": "TYPE_FP32", "dims": dims} for name, dims in shapes.items()]


def _dims(shapes: Shapes) -> dict[str, Any]:
    return {name: {"dim": list(shape)} for name, shape in shapes.items()}


def _model_file(path: Path) -> dict[str, Path | str]:
    return {PLATFORMS[path.suffix][2]: path}


def _warmup_values(source: SourceModel, shapes: Shapes) -> dict[str, np.ndarray]:
    """Return valid inputs of the given shapes: one known word per token, and equal segments; features are zeros."""
    segments = source.manifest.decoding.num_segments
    borders = np.arange(segments + 1, dtype=np.float32) / segments
    values: dict[str, Any] = {
        "query_tokens": np.int32(1),
        "query_length": np.int32(max(shapes.get("query_tokens", (1,))[-1], 1)),
        VIDEO_INDEX: np.int32(0),
        "segment_spans": np.stack((borders[:-1], borders[1:]), axis=1),
    }
    return {
        name: np.ascontiguousarray(np.broadcast_to(values[name], shape)) if name in values else np.zeros(shape)
        for name, shape in shapes.items()
    }


def _warmup(values: Mapping[str, np.ndarray], batch: int, kinds: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return a warm-up request of `batch` rows; `kinds` has the data types that are not int32 or FP32."""
    kinds = kinds or {}
    inputs = {}
    for name, value in values.items():
        kind = kinds.get(name, "TYPE_INT32" if value.dtype == np.int32 else "TYPE_FP32")
        origin = {"zero_data": True} if is_features(name) else {"input_data_file": name}
        inputs[name] = {"data_type": kind, "dims": list(value.shape), **origin}
    return {"name": f"{batch} at once", "batch_size": batch, "inputs": inputs}


def is_features(name: str) -> bool:
    """Return whether a tensor has features, which are zeros in warm-up requests."""
    return name.endswith("_features")
