"""Build the Triton configuration of each model, as values that tests read without Triton.

Fields are those of `ModelConfig` in model_config.proto of triton-inference-server/common.
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
from export.engine.profiles import DEFAULT_BATCH, DEFAULT_CACHED_VIDEOS, MOST_ENCODED
from runtime.artifacts.engine_metadata import Sidecar, read_sidecar
from runtime.artifacts.manifest import Manifest
from runtime.artifacts.onnx_metadata import check
from runtime.backends import engine_compatibility, triton_protocol
from runtime.backends.batch_shapes import MinOptMax, padded_length
from runtime.backends.onnxruntime_backend import locate_part
from runtime.backends.tensorrt_backend import locate_video_part
from runtime.backends.triton_backend import FORMAT, PARAMETER, FrontConfig
from runtime.core.batch import ENCODED_FEATURES, VIDEO_INDEX
from runtime.core.errors import DeviceError, GroundingError, ModelFileError, excerpt
from runtime.core.io.digests import sha256
from runtime.core.io.input_files import check_file

Kind = Literal["auto", "cpu", "cuda"]
KINDS = {"auto": "KIND_AUTO", "cpu": "KIND_CPU", "cuda": "KIND_GPU"}
FORMAT_PARAMETER = "drn.format"
PLATFORMS = {
    ".onnx": ("onnxruntime_onnx", "onnxruntime", "model.onnx"),
    ".engine": ("tensorrt_plan", "tensorrt", "model.plan"),
}
Shapes = Mapping[str, Sequence[int]]


@dataclasses.dataclass(frozen=True)
class ServingOptions:
    """The options of serving a model.

    Attributes:
        name: of the front; networks are called after it.
        device: where an ONNX network runs; `auto` is a GPU if Triton sees one. Engines run on GPUs.
        batch: most queries of an ONNX network that go through together; an engine has its own.
        instances: processes of the front.
        wait_ms: how long the first of a batch of requests waits for others.
        threads: CPU threads of an ONNX network; ONNX Runtime's choice when None.
    """

    name: str = "drn"
    device: Kind = "auto"
    batch: int = DEFAULT_BATCH[2]
    instances: int = 2
    wait_ms: float = 1.0
    threads: int | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", self.name):
            raise GroundingError(
                f"--name {excerpt(self.name)} becomes part of addresses; it holds letters, digits, - and _, a "
                "letter first.",
                code="invalid_option",
            )
        if (
            min(self.batch, self.instances, 1 if self.threads is None else self.threads) < 1
            or not 0 <= self.wait_ms <= 1000
        ):
            raise GroundingError(
                f"--batch, --instances and --threads are at least 1 and --wait-ms is 0 to 1000; {self.batch}, "
                f"{self.instances}, {self.threads} and {self.wait_ms:g} were given.",
                code="invalid_option",
            )


@dataclasses.dataclass(frozen=True)
class TritonModel:
    """One model of the repository.

    Attributes:
        config: of `ModelConfig`, as its JSON form has it.
        files: of a version, by name: a file to be copied, or text.
        warmup: the inputs that Triton runs once before a version answers, (size,) raw values by file name.
    """

    config: Mapping[str, Any]
    files: Mapping[str, Path | str]
    warmup: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.config["name"])


@dataclasses.dataclass(frozen=True)
class SourceModel:
    """A model file and what limits how it is asked.

    Attributes:
        manifest: its longest query is the longest that the file takes.
        batch: smallest, best and largest.
        query_length: smallest, best and largest.
        path: of the whole network, or of the query part.
        video: of the video part.
        encoded: shape (D, T) and Triton's type of what stands between the parts.
        videos: most encodings that the query part takes.
        encoded_together: most videos that the video part takes.
        profiles: how many an engine has, whole or query part, and video part.
    """

    manifest: Manifest
    batch: MinOptMax
    query_length: MinOptMax
    path: Path
    video: Path | None = None
    encoded: tuple[tuple[int, int], str] = ((0, 0), "TYPE_FP32")
    videos: int = DEFAULT_CACHED_VIDEOS
    encoded_together: int = MOST_ENCODED
    profiles: tuple[int, int] = (1, 1)

    @property
    def is_engine(self) -> bool:
        return self.path.suffix == ".engine"


def read_model(path: Path, serving: ServingOptions) -> SourceModel:
    """Return what is to be served from a model file; of a split model the query part is named.

    Raises:
        ModelFileError: it is not a model of ours, or none that Triton runs.
        DeviceError: it does not run on the device that was asked for.
    """
    if path.suffix not in PLATFORMS:
        raise ModelFileError(
            f"Triton serves .onnx and .engine files, and {excerpt(path.name)} is neither; export a checkpoint with "
            "`python -m export.to_onnx`.",
            code="wrong_suffix",
        )
    check_file(path, "The model file", ModelFileError)
    if path.suffix == ".engine" and serving.device == "cpu":
        raise DeviceError(
            f"{path.name} is an engine, which runs on a GPU only; leave --device out, or serve its graph.",
            code="gpu_required",
        )
    source = _read_engine(path) if path.suffix == ".engine" else _read_graph(path, serving)
    if source.encoded[1] == "TYPE_BF16":
        raise ModelFileError(
            f"{path.name} passes bfloat16 between its two parts, which Triton's Python backend cannot take as an "
            "array; give the whole .engine, or build the pair in fp16.",
            code="precision_unsupported",
        )
    return source


def _read_graph(path: Path, serving: ServingOptions) -> SourceModel:
    manifest = manifest_in(path)
    _check_part(path, manifest)
    if manifest.precision == "bf16":
        raise ModelFileError(
            f"ONNX Runtime has no bf16 kernels to run {path.name}; give its .engine, or fp16.",
            code="precision_unsupported",
        )
    longest = manifest.max_query_length
    # Eight words are usual in every data set that DRN is trained on.
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
            f"{path.name} was built for {content['target']}, whose plans Triton does not run; build it with "
            "`python -m export.build_engine --target tensorrt`, or serve its graph.",
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
    plan, siblings = locate_video_part(path, sidecar)
    shapes = content["profiles"][-1]["shapes"][ENCODED_FEATURES]
    channels, segments = shapes[2][1:]
    return dataclasses.replace(
        source,
        video=plan,
        # TensorRT 8.6 is given a graph whose inputs and outputs are all float32.
        encoded=_encoded(engine_compatibility.source_onnx(plan, siblings.content))
        if content.get("strongly_typed", True)
        else ((channels, segments), "TYPE_FP32"),
        videos=shapes[2][0],
        encoded_together=_most_together(siblings),
        profiles=(len(content["profiles"]), len(siblings.content["profiles"])),
    )


def _check_part(path: Path, manifest: Manifest) -> None:
    if manifest.part not in ("whole", "query"):
        raise ModelFileError(
            f"{path} is one part of a model ({manifest.part}); give the query part (its name holds .query.).",
            code="model_part",
        )


def _most_together(video: Sidecar) -> int:
    return max(int(profile["shapes"]["segment_features"][2][0]) for profile in video.content["profiles"])


def _encoded(video: Path) -> tuple[tuple[int, int], str]:
    """Return shape and type of what a video part's graph puts out."""
    import onnx

    check_file(video, "The graph of the video part, which has the data type of the encodings,", ModelFileError)
    check(video)
    (output,) = onnx.load(video, load_external_data=False).graph.output
    kinds = onnx.TensorProto
    names = {kinds.FLOAT: "TYPE_FP32", kinds.FLOAT16: "TYPE_FP16", kinds.BFLOAT16: "TYPE_BF16"}
    _, channels, segments = (dimension.dim_value for dimension in output.type.tensor_type.shape.dim)
    return (channels, segments), names[output.type.tensor_type.elem_type]


def build_models(source: SourceModel, serving: ServingOptions) -> list[TritonModel]:
    """Return the models of a repository, the front last, since it calls the others."""
    whole = source.video is None
    network = f"{serving.name}_network" if whole else f"{serving.name}_query"
    video = "" if whole else f"{serving.name}_video"
    networks = [_single_model(source, serving, network)] if whole else _pair(source, serving, video, network)
    files = {
        f"{part.name}/{name}": sha256(path)
        for part in networks
        for name, path in part.files.items()
        if isinstance(path, Path)
    }
    about = FrontConfig(
        source.manifest, network, video, source.batch.max, source.videos, source.encoded_together, files
    )  # fmt: skip
    return [*networks, _front(about, serving)]


def _front(about: FrontConfig, serving: ServingOptions) -> TritonModel:
    manifest = about.manifest

    def given(name: str, kind: str, *dims: int, optional: bool = False) -> dict[str, Any]:
        # Requests of other shapes are answered together all the same: the front pads what the network gets.
        tensor: dict[str, Any] = {"name": name, "data_type": kind, "dims": list(dims), "allow_ragged_batch": True}
        return {**tensor, "optional": True} if optional else tensor

    config = {
        "name": serving.name,
        "backend": "python",
        "default_model_filename": "model.py",
        "max_batch_size": about.batch,
        "version_policy": TWO_VERSIONS,
        "input": [
            given(triton_protocol.QUERY, "TYPE_STRING", -1),
            given(triton_protocol.FEATURES, "TYPE_FP32", -1, manifest.features.dim),
            given(triton_protocol.DURATION, "TYPE_FP64", 1),
            given(triton_protocol.NUM_FRAMES, "TYPE_INT32", 1, optional=True),
            given(triton_protocol.TOP_K, "TYPE_INT32", 1, optional=True),
            given(triton_protocol.WINDOWS, "TYPE_FP64", 3, optional=True),
            given(triton_protocol.ALWAYS_ANSWER, "TYPE_BOOL", 1, optional=True),
        ],
        "output": [
            {"name": triton_protocol.MOMENTS, "data_type": "TYPE_FP64", "dims": [-1, -1, 3]},
            {"name": triton_protocol.COUNT, "data_type": "TYPE_INT32", "dims": [-1]},
        ],
        "dynamic_batching": {"max_queue_delay_microseconds": round(1000 * serving.wait_ms)},
        "instance_group": [{"kind": "KIND_CPU", "count": serving.instances}],
        "parameters": {
            FORMAT_PARAMETER: {"string_value": FORMAT},
            PARAMETER: {"string_value": about.to_json()},
        },
    }
    shell = Path(runtime.triton.__file__).with_name("model.py")
    return TritonModel(config, {"model.py": shell, triton_protocol.ABOUT_FILE: about.to_json() + "\n"})


# The front of a new version calls networks of that version; the old ones stay until it answers.
TWO_VERSIONS = {"latest": {"num_versions": 2}}


def _single_model(source: SourceModel, serving: ServingOptions, name: str) -> TritonModel:
    segments, width = source.manifest.decoding.num_segments, source.manifest.features.dim
    _, best, most = source.batch

    def shapes(length: int) -> Shapes:
        return {
            "query_tokens": (length,),
            "query_length": (1,),
            "segment_features": (segments, width),
            "segment_spans": (segments, 2),
        }

    graphs = [
        # The network itself sees lengths of shape (B,).
        {"batch_size": batch, "input": _dims({**shapes(length), "query_length": ()})}
        for batch in sorted({1, best, most})
        for length in padded_lengths(source.query_length.max)
    ]
    warmup = _warmup_values(source, shapes(padded_length(source.query_length.opt, source.query_length.max)))
    config = {
        **_network(source, serving, name, source.path, source.profiles[0]),
        "max_batch_size": most,
        "input": [
            {"name": "query_tokens", "data_type": "TYPE_INT32", "dims": [-1]},
            # Dimensions may not be empty here, so that lengths are (B, 1) for callers.
            {"name": "query_length", "data_type": "TYPE_INT32", "dims": [1], "reshape": {"shape": []}},
            {"name": "segment_features", "data_type": "TYPE_FP32", "dims": [segments, width]},
            {"name": "segment_spans", "data_type": "TYPE_FP32", "dims": [segments, 2]},
        ],
        "output": _heads(source),
        "dynamic_batching": {"preferred_batch_size": sorted({best, most})},
        "model_warmup": [_warmup(warmup, batch) for batch in sorted({1, best})],
    }
    return TritonModel(_with_graphs(config, source, graphs), _plan(source.path), warmup)


def _pair(source: SourceModel, serving: ServingOptions, video: str, query: str) -> list[TritonModel]:
    """Return the two parts. Queries and videos differ in number, so Triton cannot batch the second: the front does."""
    assert source.video is not None
    segments, width = source.manifest.decoding.num_segments, source.manifest.features.dim
    encoded, kind = source.encoded
    _, best, most = source.batch

    def shapes(batch: int, length: int) -> Shapes:
        return {
            "query_tokens": (batch, length),
            "query_length": (batch,),
            VIDEO_INDEX: (batch,),
            ENCODED_FEATURES: (1, *encoded),
            "segment_spans": (1, segments, 2),
        }

    together = source.encoded_together
    requested = {"segment_features": (segments, width)}
    video_config = {
        **_network(source, serving, video, source.video, source.profiles[1]),
        "max_batch_size": together,
        "input": [{"name": "segment_features", "data_type": "TYPE_FP32", "dims": [segments, width]}],
        "output": [{"name": ENCODED_FEATURES, "data_type": kind, "dims": list(encoded)}],
        "dynamic_batching": {"preferred_batch_size": [together]},
        "model_warmup": [_warmup(_warmup_values(source, requested), 1)],
    }
    graphs = [
        {"batch_size": 0, "input": _dims(shapes(batch, length))}
        for batch in sorted({1, best, most})
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
        TritonModel(_with_graphs(video_config, source, []), _plan(source.video)),
        TritonModel(_with_graphs(query_config, source, graphs), _plan(source.path), warmup),
    ]


def padded_lengths(longest: int) -> list[int]:
    """Return the lengths in tokens at which queries reach a network that takes so many at most."""
    return sorted({padded_length(length, longest) for length in range(1, longest + 1)})


def _network(source: SourceModel, serving: ServingOptions, name: str, path: Path, profiles: int) -> dict[str, Any]:
    platform, backend, filename = PLATFORMS[path.suffix]
    group: dict[str, Any] = {"kind": KINDS[serving.device], "count": 1}
    parameters = {FORMAT_PARAMETER: FORMAT}
    if source.is_engine:
        group["kind"] = "KIND_GPU"
        # Unless told otherwise Triton takes the first alone, which is for a single query.
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


def _with_graphs(config: dict[str, Any], source: SourceModel, specs: Sequence[Any]) -> dict[str, Any]:
    """Return a configuration with CUDA graphs, where they are for engines; of these shapes alone.

    None has a `graph_lower_bound`: it would be run on smaller requests with whatever lies behind them in memory, and
    what is no word would be looked up.
    """
    return (
        {**config, "optimization": {"cuda": {"graphs": True, "graph_spec": list(specs)}}}
        if source.is_engine
        else config
    )


def _heads(source: SourceModel) -> list[dict[str, Any]]:
    locations = source.manifest.decoding.num_locations
    shapes = {"matching_logits": [locations], "boundary_distances": [locations, 2], "iou_logits": [locations]}
    return [{"name": name, "data_type": "TYPE_FP32", "dims": dims} for name, dims in shapes.items()]


def _dims(shapes: Shapes) -> dict[str, Any]:
    return {name: {"dim": list(shape)} for name, shape in shapes.items()}


def _plan(path: Path) -> dict[str, Path | str]:
    return {PLATFORMS[path.suffix][2]: path}


def _warmup_values(source: SourceModel, shapes: Shapes) -> dict[str, np.ndarray]:
    """Return inputs of these shapes that mean something: zeros would be a query of no words, and random integers words
    that there are not. Features are left out; they may be zeros."""
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
    """Return one warm-up request of so many rows."""
    kinds = kinds or {}
    inputs = {}
    for name, value in values.items():
        kind = kinds.get(name, "TYPE_INT32" if value.dtype == np.int32 else "TYPE_FP32")
        origin = {"zero_data": True} if is_features(name) else {"input_data_file": name}
        inputs[name] = {"data_type": kind, "dims": list(value.shape), **origin}
    return {"name": f"{batch} at once", "batch_size": batch, "inputs": inputs}


def is_features(name: str) -> bool:
    return name.endswith("_features")
