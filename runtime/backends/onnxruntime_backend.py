"""The network in ONNX Runtime, on a CPU or a CUDA GPU."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.artifacts import extractor_manifest
from runtime.artifacts.encoded_video import EncodedVideo
from runtime.artifacts.manifest import METADATA_KEY, Manifest
from runtime.artifacts.onnx_metadata import MISMATCH, Content, DigestCheck, check, read_metadata
from runtime.backends.cuda_driver import disable_in_forked_children
from runtime.backends.exact_int8 import precision_of_file, source_for_cpu
from runtime.core.batch import ENCODED_FEATURES, HEAD_NAMES, INPUT_NAMES, VIDEO_INDEX, Batch, Heads
from runtime.core.errors import DeviceError, DeviceMemoryError, ModelFileError, ShapeError, is_out_of_memory, one_line
from runtime.core.io.digests import sha256
from runtime.core.lru_cache import LruCache

if TYPE_CHECKING:
    from runtime.backends.base import Device

log = logging.getLogger("drn")

VIDEO_INPUTS = ("segment_features",)
VIDEO_OUTPUTS = (ENCODED_FEATURES,)
QUERY_INPUTS = ("query_tokens", "query_length", VIDEO_INDEX, ENCODED_FEATURES, "segment_spans")
# 0.5 MB each at full size.
MAX_ENCODINGS_ON_DEVICE = 256
# On a CPU a convolution is slower where it pads by itself (`calib.graph.conv_padding`), so that step is not to be
# merged into it.
DISABLED_OPTIMIZERS = ["Pad_Fusion"]
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def import_onnxruntime(gpu: bool) -> tuple[Any, str]:
    """Return ONNX Runtime, and what it did not find of CUDA.

    Args:
        gpu: whether a GPU may be used, which takes CUDA and cuDNN: where they are in NVIDIA's wheels, as those of
            `onnxruntime-gpu[cuda,cudnn]` and of torch, ONNX Runtime does not find them by itself.

    Raises:
        DeviceError: it is not installed.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise DeviceError(
            "ONNX Runtime is not installed; "
            "run `pip install '.[cpu]'` in the drn-deploy directory, or `'.[gpu]'` for a "
            "CUDA GPU (one of them: both own the same folder).",
            code="missing_library",
        ) from error
    # Of 1.21 and later; in a build for CPUs it does nothing.
    if not gpu or not hasattr(ort, "preload_dlls"):
        return ort, ""
    # What it does not find it prints, and stdout is for results.
    with contextlib.redirect_stdout(io.StringIO()):
        for folder in _cuda_folders(Path(ort.__file__)):
            ort.preload_dlls(directory=str(folder))
    with contextlib.redirect_stdout(io.StringIO()) as output:
        # What was loaded above is found by its name.
        ort.preload_dlls()
    return ort, " ".join(output.getvalue().split())


def _cuda_folders(ort: Path) -> list[Path]:
    """Return the folders with CUDA libraries of NVIDIA's wheels, where ONNX Runtime does not look by itself.

    `preload_dlls()` looks beside its own package only ("nvidia site packages" of onnxruntime/__init__.py); with
    `directory` it looks in that one folder. A wheel may be anywhere that `nvidia` can be imported from.
    """
    result = importlib.util.find_spec("nvidia")
    places = list(result.submodule_search_locations or ()) if result else []
    return [
        folder
        for location in map(Path, places)
        if location.resolve().parent != ort.resolve().parent.parent
        for folder in sorted((*location.glob("*/lib"), *location.glob("*/bin"), *location.glob("*/bin/*")))
        if folder.is_dir()
    ]


def create_session(path: Path, device: Device = "auto", threads: int | None = None) -> tuple[Any, Device, Content]:
    """Open an ONNX file of any kind.

    The file is hashed in a thread while ONNX Runtime optimizes the graph, which takes longer.

    Returns:
        ONNX Runtime's session, the device that it runs on, and the hashes of the file.

    Raises:
        ModelFileError: the file is no graph that ONNX Runtime takes, or does not match the digest that it records.
        DeviceError: ONNX Runtime is not installed, or a GPU was asked for that it does not have.
    """
    ort, not_found = import_onnxruntime(gpu=device != "cpu")
    available = ort.get_available_providers()
    if device == "auto":
        device = "cuda" if PROVIDERS["cuda"] in available else "cpu"
    if PROVIDERS.get(device) not in available:
        raise DeviceError(
            f"A {device} device was asked for and this ONNX Runtime {ort.__version__} offers "
            f"{', '.join(available)}; "
            "install '.[gpu]' in place of '.[cpu]', or pass --device cpu.",
            code="gpu_unavailable",
        )
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    checked = DigestCheck(path)
    try:
        retained = DISABLED_OPTIMIZERS if device == "cpu" else None
        source = source_for_cpu(path) if device == "cpu" else str(path)
        providers = [(PROVIDERS[device], _cuda_options(path))] if device == "cuda" else [PROVIDERS[device]]
        session = ort.InferenceSession(source, options, providers=providers, disabled_optimizers=retained)
    # ONNX Runtime's exceptions share no base class below Exception.
    except Exception as error:
        # A file that is damaged is reported as such.
        if checked.mismatch is not None:
            raise checked.mismatch from error
        first_line = one_line(error)
        raise ModelFileError(
            f"{path} is not an ONNX model that ONNX Runtime {ort.__version__} can open ({first_line}); "
            "export it again.",
            code="not_onnx",
        ) from error
    # A GPU session falls back to the CPU without a word when a CUDA library is missing.
    if PROVIDERS[device] not in session.get_providers():
        raise DeviceError(
            f"ONNX Runtime could not start its {PROVIDERS[device]}, usually because a CUDA or cuDNN library is "
            f"missing ({not_found.rstrip('.') or 'it does not say which'}); run `pip install "
            "'onnxruntime-gpu[cuda,cudnn]'`, or pass --device cpu.",
            code="gpu_unavailable",
        )
    return session, device, checked.result()


def _cuda_options(path: Path) -> dict[str, str]:
    """Return the options of ONNX Runtime's CUDA provider for a file.

    TF32 is on by default there (`use_tf32`, "default: 1"), so that FP32 is not FP32; a graph that was built with --tf32
    says so. Convolutions are searched exhaustively by default, at the first call of every new shape
    (`cudnn_conv_algo_search`, "EXHAUSTIVE"). Both: onnxruntime.ai, CUDA-ExecutionProvider.
    """
    allowed = False
    with contextlib.suppress(ModelFileError, ValueError, AttributeError):
        manifest = json.loads(read_metadata(path).get(METADATA_KEY) or "{}")
        allowed = manifest.get("training", {}).get("precision", {}).get("tf32") is True
    return {"use_tf32": str(int(allowed)), "cudnn_conv_algo_search": "HEURISTIC"}


class Session:
    """An ONNX file of this toolkit in ONNX Runtime.

    Args:
        path, device, threads: see `create_session`.
        part_of: the query part that names the file, and the SHA-256 that it names.

    Raises:
        ModelFileError: the file is not such a graph, is damaged, or is not the one that the query part names.
        DeviceError: ONNX Runtime is not installed, or a GPU was asked for that it does not have.
    """

    def __init__(
        self,
        path: Path,
        device: Device = "auto",
        threads: int | None = None,
        part_of: tuple[Path, str] | None = None,
    ) -> None:
        session, device, content = create_session(path, device, threads)
        if part_of is not None and content.sha256 != part_of[1]:
            raise _other_part(path, part_of[0])
        if content.recorded is None:
            log.info("%s records no digest, so damage to it cannot be detected; export it again to add one.", path)
        self.path = path
        self.device: Device = device
        # On a GPU tensors are bound: what is there already is not copied, and outputs come back in one go.
        self.binds = device == "cuda"
        self._process = os.getpid()
        metadata = session.get_modelmeta().custom_metadata_map
        if extractor_manifest.METADATA_KEY in metadata:
            raise extractor_manifest.no_model(path)
        manifest = Manifest.from_json(metadata.get(METADATA_KEY), source=str(path))
        self.manifest = dataclasses.replace(manifest, precision=precision_of_file(path, manifest.precision))
        about = manifest.training.get("precision")
        if manifest.precision == "int8" and not (isinstance(about, Mapping) and "cpu" in about):
            log.warning(
                "%s does not record on which CPU it was checked against FP32. If that was one without VNNI, its "
                "answers are more accurate than its report says. Judge it again with `python -m export.verify`.",
                path,
            )
        self._session = session
        self._outputs = {output.name: (output.shape, output.type) for output in session.get_outputs()}
        if self.binds:
            disable_in_forked_children(self)

    def require(self, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        """Raise ModelFileError unless the graph has these inputs and outputs."""
        missing = (set(inputs) - {argument.name for argument in self._session.get_inputs()}) | (
            set(outputs) - set(self._outputs)
        )
        if missing:
            raise ModelFileError(
                f"{self.path} lacks {', '.join(sorted(missing))}, so it is not a DRN graph; export it again.",
                code="unexpected_tensors",
            )

    def run(self, outputs: Sequence[str], feed: Mapping[str, Any]) -> list[Any]:
        """Return the outputs.

        `feed` holds arrays and, where the session binds, tensors that `resident` returned.

        Raises:
            ShapeError: the arrays do not fit the graph.
            DeviceMemoryError: memory ran out.
            DeviceError: the process was forked after CUDA had started.
        """
        self._check_process()
        # Where there is no row, ONNX Runtime divides by their number, and the process dies of it.
        if not len(next(iter(feed.values()))):
            return [self._nothing(*self._outputs[name]) for name in outputs]
        try:
            return self._bound(outputs, feed) if self.binds else self._session.run(outputs, feed)
        # Its own exceptions share no base class below Exception, and what is bound fails with a RuntimeError.
        except Exception as error:
            if not (type(error).__module__.startswith("onnxruntime") or isinstance(error, RuntimeError)):
                raise
            said = str(error).strip().splitlines()[0]
            if is_out_of_memory(said):
                raise DeviceMemoryError(
                    f"The {self.device} device has no memory left for this batch ({said}); pass a smaller --batch-size."
                ) from error
            raise ShapeError(f"The model does not take this batch: {said}.") from error

    @staticmethod
    def _nothing(shape: Sequence[Any], kind: str) -> np.ndarray:
        return np.empty((0, *shape[1:]), _DTYPES[kind])

    def resident(self, array: np.ndarray) -> Any:
        """Return an array as a tensor on the session's device; DeviceError as of `run`."""
        self._check_process()
        import onnxruntime as ort

        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self.device, 0)

    def _check_process(self) -> None:
        if self.binds and os.getpid() != self._process:
            raise DeviceError(
                "This process was forked from one that had started CUDA, which does not survive that; open the model "
                "in the process that asks, or start processes by 'spawn'.",
                code="forked_process",
            )

    def _bound(self, outputs: Sequence[str], feed: Mapping[str, Any]) -> list[Any]:
        binding = self._session.io_binding()
        for name, value in feed.items():
            if isinstance(value, np.ndarray):
                binding.bind_cpu_input(name, np.ascontiguousarray(value))
            else:
                binding.bind_ortvalue_input(name, value)
        for name in outputs:
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        return binding.copy_outputs_to_cpu()


class OnnxRuntimeBackend:
    """A whole `.onnx` file exported by this toolkit; errors as of `Session`."""

    def __init__(self, session: Session) -> None:
        session.require(INPUT_NAMES, HEAD_NAMES)
        self.device = session.device
        self.manifest = session.manifest
        self._session = session

    def run(self, batch: Batch) -> Heads:
        """Return the heads of a batch; ShapeError if its arrays do not fit the graph."""
        return Heads(*self._session.run(HEAD_NAMES, vars(batch)))


class OnnxRuntimePair:
    """The two `.onnx` files that a model was split into.

    Raises:
        ModelFileError: the video part is missing, is not the one that the query part was made with, or no such graph.
    """

    def __init__(self, query: Session, threads: int | None = None) -> None:
        query.require(QUERY_INPUTS, HEAD_NAMES)
        self.device = query.device
        self.manifest = query.manifest
        self._query = query
        self._threads = threads
        self._on_device: LruCache[str, Any] = LruCache(MAX_ENCODINGS_ON_DEVICE)
        if query.binds:
            disable_in_forked_children(self)
        named = self.manifest.video_part
        if len(named) != 1:
            raise ModelFileError(
                f"{query.path} names {len(named)} video parts and needs one; export it again.", code="missing_part"
            )
        ((name, digest),) = named.items()
        self._video = self._part(_existing_part(query.path, name), digest)
        self._video.require(VIDEO_INPUTS, VIDEO_OUTPUTS)

    def encode(self, segment_features: np.ndarray) -> np.ndarray:
        """Return (V, D, T) encoded features of (V, T, D) float32 segments."""
        (encoded,) = self._video.run(VIDEO_OUTPUTS, {"segment_features": segment_features})
        return encoded

    def ask(
        self,
        query_tokens: np.ndarray,
        query_length: np.ndarray,
        videos: Sequence[EncodedVideo],
        video_index: np.ndarray,
    ) -> Heads:
        """Return the heads of B queries; see `PairBackend`."""
        if not len(query_length):
            return Heads(*self._query.run(HEAD_NAMES, {"query_length": query_length}))
        (first, *others) = videos
        features = np.stack([video.features for video in videos]) if others else self._features(first)
        spans = np.stack([video.spans for video in videos]) if others else first.spans[None]
        arrays: tuple[Any, ...] = (query_tokens, query_length, video_index, features, spans)
        return Heads(*self._query.run(HEAD_NAMES, dict(zip(QUERY_INPUTS, arrays))))

    def _features(self, video: EncodedVideo) -> Any:
        """Return the features of one video, (1, D, T): an array, or on a GPU a tensor that stays there."""
        if not self._query.binds:
            return video.features[None]
        tensor = self._on_device.get(video.key)
        if tensor is None:
            tensor = self._query.resident(video.features[None])
            self._on_device.put(video.key, tensor)
        return tensor

    def _part(self, path: Path, digest: str) -> Session:
        try:
            return Session(path, self.device, self._threads, (self._query.path, digest))
        except ModelFileError as error:
            if sha256(path) != digest:
                raise _other_part(path, self._query.path) from error
            raise

    def run(self, batch: Batch) -> Heads:
        """Return the heads of a batch, as the whole model would."""
        from runtime.backends.base import run_pair

        return run_pair(self, batch)


def open_graph(
    path: str | os.PathLike[str], device: Device = "auto", threads: int | None = None
) -> OnnxRuntimeBackend | OnnxRuntimePair:
    """Open a whole graph, or the pair that a query part belongs to; errors as of `Session` and `OnnxRuntimePair`."""
    session = Session(Path(path), device, threads)
    part = session.manifest.part
    if part in ("whole", "query"):
        return OnnxRuntimePair(session, threads) if part == "query" else OnnxRuntimeBackend(session)
    raise ModelFileError(
        f"{path} is one part of a model ({part}), which answers nothing by itself; give the query part "
        "(its name ends in .query.onnx).",
        code="model_part",
    )


def locate_part(query: Path, name: str, digest: str) -> Path:
    """Return the path of a part that a query part names by file name and SHA-256.

    Raises:
        ModelFileError: the file is not beside the query part, or is another one.
    """
    path = _existing_part(query, name)
    if sha256(path) != digest:
        raise _other_part(path, query)
    check(path)
    return path


def _existing_part(query: Path, name: str) -> Path:
    path = query.with_name(Path(name).name)
    if not path.is_file():
        raise ModelFileError(
            f"{query} needs {path.name} beside it, and there is none; copy it there.", code="missing_file"
        )
    return path


def _other_part(path: Path, query: Path) -> ModelFileError:
    return ModelFileError(
        f"{path} is not the file that {query.name} was made with (another export, or damaged); "
        "copy all files of one export, or export again with --split.",
        code=MISMATCH,
    )
