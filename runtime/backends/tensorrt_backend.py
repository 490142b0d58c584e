"""Run models and feature extractors as TensorRT or TensorRT-RTX engines; split models store encodings on the GPU.

Threads may share a model, which runs one call at a time. `runtime.backends.engine_compatibility` and `batch_shapes`
decide without a GPU; `tensorrt_engine` loads and runs an engine.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.artifacts.encoded_video import EncodedVideo
from runtime.artifacts.engine_metadata import EngineMetadata, Sidecar, metadata_path, read_sidecar, read_verified
from runtime.artifacts.extractor_manifest import ExtractorManifest
from runtime.artifacts.manifest import Manifest
from runtime.backends import engine_compatibility
from runtime.backends.base import check_answers_queries, recorded_video_part
from runtime.backends.batch_shapes import as_slice, gather_rows, referenced_videos, row_slices, row_slices_by_video
from runtime.backends.cuda_driver import Cuda, OutOfDeviceMemory
from runtime.backends.encoding_cache import EncodingSlots
from runtime.backends.tensorrt_engine import SPANS, TensorRTEngine
from runtime.backends.tensorrt_model import PlanUse, TensorRTModel
from runtime.core.batch import ENCODED_FEATURES, VIDEO_INDEX, Batch, Heads, check_numbers
from runtime.core.bfloat16 import from_bfloat16, to_bfloat16
from runtime.core.errors import DeviceError, DeviceMemoryError, ModelFileError, ShapeError
from runtime.core.io.digests import json_digest

if TYPE_CHECKING:
    from runtime.backends.base import Device

log = logging.getLogger("drn")


def open_engine(
    path: Path,
    device: Device = "auto",
    threads: int | None = None,
    *,
    library: Any = None,
    cuda: Cuda | None = None,
) -> TensorRTBackend | TensorRTPair:
    """Open a whole model, or both parts of a split model from its query part, with its short-query plans.

    Args:
        device: `auto` or `cuda`; an engine does not run on a CPU.
        library, cuda: replace the TensorRT module and the driver in tests.

    Raises:
        ModelFileError: the plan does not match its metadata file, is no DRN engine, or is a video part.
        DeviceError: the plan was built for another library, version or GPU, or no GPU is available.
        DeviceMemoryError: the GPU has not enough memory.
    """
    del threads
    sidecar = read_sidecar(path)
    _check_device(path, device)
    check_answers_queries(path, sidecar.manifest)
    part = sidecar.manifest.part
    required = [(path, sidecar)]
    if part == "query":
        required.append(locate_video_part(path, sidecar))
    optional = short_query_plans(path, sidecar)
    networks = []
    try:
        for plan, metadata in required:
            cuda, library = _load_libraries(plan, metadata, cuda, library)
            networks.append(TensorRTEngine(library, cuda, plan, metadata))
        for plan, metadata in optional:
            cuda, library = _load_libraries(plan, metadata, cuda, library)
            try:
                networks.append(TensorRTEngine(library, cuda, plan, metadata))
            except DeviceMemoryError as error:
                log.warning("%s %s", error, _effect_of_missing_plan(plan, path))
    except BaseException:
        for network in networks:
            network.close()
        raise
    short = networks[len(required) :]
    if part == "query":
        return TensorRTPair(sidecar.manifest, networks[0], networks[1], short)
    return TensorRTBackend(sidecar.manifest, networks[0], short_query_networks=short)


def open_extractor_engine(
    path: Path, device: Device = "auto", *, library: Any = None, cuda: Cuda | None = None
) -> TensorRTExtractor:
    """Open an engine that extracts clip features; see `open_engine` for the arguments and other errors.

    Raises:
        ModelFileError: the plan does not match its metadata file, or is no extractor engine.
    """
    content = read_verified(path)
    manifest = ExtractorManifest.from_dict(content["manifest"], str(metadata_path(path)))
    sidecar = EngineMetadata(manifest, content)
    _check_device(path, device)
    cuda, library = _load_libraries(path, sidecar, cuda, library)
    identity = json_digest([content["sha256"][path.name], content["digest"]])
    return TensorRTExtractor(TensorRTEngine(library, cuda, path, sidecar), manifest, identity)


def _check_device(path: Path, device: Device) -> None:
    if device == "cpu":
        raise DeviceError(
            f"Expected a GPU for the engine {path.name}, got --device cpu. Give the .onnx file for the CPU.",
            code="gpu_required",
        )


def locate_video_part(path: Path, sidecar: Sidecar) -> tuple[Path, Sidecar]:
    """Return the engine file of the video part of a model, and its metadata.

    Raises:
        ModelFileError: the file is missing, damaged, or of another build.
    """
    plan, digest = recorded_video_part(path, sidecar.manifest, ".engine")
    metadata = read_sidecar(plan)
    if digest not in metadata.content["sha256"].values():
        raise _other_build(plan, path, sidecar)
    return plan, metadata


def _other_build(plan: Path, path: Path, sidecar: Sidecar) -> ModelFileError:
    command = engine_compatibility.rebuild_command(path, sidecar)
    return ModelFileError(
        f"{plan} has another hash than {path.name} records. Copy all files of one build, or run `{command}`.",
        code="digest_mismatch",
    )


def _effect_of_missing_plan(plan: Path, path: Path) -> str:
    """Return a sentence that states which queries take longer without a short-query plan."""
    steps = engine_compatibility.unrolled_steps({"unrolled": [plan.name]})
    tokens = f" of at most {steps[0]} tokens" if steps else ""
    return f"{path.name} runs without {plan.name}, so queries{tokens} take longer."


def short_query_plans(path: Path, sidecar: Sidecar) -> list[tuple[Path, Sidecar]]:
    """Return the short-query plans that were built with a plan, and their metadata.

    A missing file is only a warning, because the plan for longer queries gives the same results.

    Raises:
        ModelFileError: a plan is damaged or of another build.
    """
    plans = []
    for name, digest in sidecar.content.get("unrolled", {}).items():
        plan = path.with_name(Path(name).name)
        missing = next((file for file in (plan, metadata_path(plan)) if not file.is_file()), None)
        if missing:
            log.warning(
                "%s is missing. %s Copy the file to this directory.", missing, _effect_of_missing_plan(plan, path)
            )
            continue
        metadata = read_sidecar(plan)
        if metadata.content["sha256"][plan.name] != digest or metadata.manifest.part != sidecar.manifest.part:
            raise _other_build(plan, path, sidecar)
        plans.append((plan, metadata))
    return plans


def _load_libraries(plan: Path, sidecar: EngineMetadata, cuda: Cuda | None, library: Any) -> tuple[Cuda, Any]:
    """Return the CUDA driver and the TensorRT module that run a plan; DeviceError if this machine cannot run it.

    CUDA is tested first: without it TensorRT 8.6 returns null objects, and a lean TensorRT 11 crashes.
    """
    gpu_error = library_error = ""
    if cuda is None:
        try:
            cuda = Cuda()
        except DeviceError as error:
            gpu_error = str(error).rstrip(".")
    if library is None and cuda is not None:
        library, library_error = _import(engine_compatibility.libraries(sidecar.content))
    host = engine_compatibility.HostInfo(
        f"{library.__name__} {library.__version__}" if library is not None else None,
        cuda.name if cuda is not None else None,
        cuda.capability if cuda is not None else None,
        library_error,
        gpu_error,
    )
    message = engine_compatibility.incompatibility(plan, sidecar, host)
    if message is not None:
        raise DeviceError(message, code="incompatible_engine")
    assert cuda is not None
    return cuda, library


def _import(names: Sequence[str]) -> tuple[Any, str]:
    """Return the first module that can be imported; None and the errors if there is none."""
    errors = [] if names else ["this version does not know its target"]
    for name in names:
        try:
            return importlib.import_module(name), ""
        except ImportError as error:
            errors.append(str(error))
    return None, "; ".join(errors)


class TensorRTExtractor(TensorRTModel):
    """A feature extractor as an engine, such as C3D; see `runtime.media.extractors.Extractor`."""

    def __init__(self, network: TensorRTEngine, manifest: ExtractorManifest, identity: str) -> None:
        super().__init__(network)
        self.manifest = manifest
        self.identity = identity

    def extract(self, clips: np.ndarray) -> np.ndarray:
        """Return (N, D) float32 features of (N, window, height, width, 3) uint8 RGB clips."""
        return self._run_one_input(self._network, "batch", "clips", clips, "features")


class _QueryModel(TensorRTModel):
    """Base of whole and split models: run each batch with the plan for its longest query.

    Args:
        networks: engine for queries of any length, and for a split model the engine of the video part.
    """

    def __init__(
        self, manifest: Manifest, *networks: TensorRTEngine, short_query_networks: Sequence[TensorRTEngine] = ()
    ) -> None:
        super().__init__(*networks, *short_query_networks)
        self.manifest = manifest
        self._plans = sorted((*short_query_networks, networks[0]), key=lambda network: network.query_length.max)
        # The plans in use; `only` limits them to one.
        self._active_plans = self._plans
        short_lengths = (network.query_length.max for network in short_query_networks)
        networks[0].short_plan_max_length = max(short_lengths, default=0)

    def plan_uses(self) -> list[PlanUse]:
        """Return the use of each plan that runs queries, in order of their maximum query length."""
        return [PlanUse(network.path.name, network.query_length.max, network.rows_answered) for network in self._plans]

    @property
    def first_lengths(self) -> list[int]:
        """Return the length, in tokens, of the shortest query that each plan runs, ascending."""
        return [1, *(network.query_length.max + 1 for network in self._plans[:-1])]

    @contextlib.contextmanager
    def only(self, plan: str) -> Iterator[None]:
        """Run every query with one plan, so that it can be checked separately; not for several threads.

        Queries that the plan does not accept raise ShapeError.

        Args:
            plan: a file name that `plan_uses` returns.
        """
        self._active_plans = [network for network in self._plans if network.path.name == plan]
        try:
            yield
        finally:
            self._active_plans = self._plans

    def warm(
        self, batches: Sequence[int], lengths: Sequence[int], progress: Callable[[int, int], None] = lambda *_: None
    ) -> int:
        """Create the contexts and CUDA graphs for queries of these sizes; see `Grounder.warm`."""
        requests: dict[Any, tuple[TensorRTEngine, dict[str, int]]] = {}
        for network, sizes in self._requests(batches, lengths):
            requests.setdefault((network, network.key(sizes)), (network, sizes))
        for done, (network, sizes) in enumerate(requests.values()):
            progress(done, len(requests))
            with self._exclusive():
                try:
                    network.warm(sizes)
                except OutOfDeviceMemory as error:
                    raise DeviceMemoryError(
                        f"The GPU's memory is full after {done} of {len(requests)} sizes. Warm fewer sizes, or build "
                        "the engine for smaller batches (--batch)."
                    ) from error
        with self._exclusive():
            for network in self._networks:
                network.contexts.save_kernels()
        progress(len(requests), len(requests))
        return len(requests)

    def _requests(
        self, batches: Sequence[int], lengths: Sequence[int]
    ) -> Iterator[tuple[TensorRTEngine, dict[str, int]]]:
        """Yield networks and sizes to warm, large batches first, so that contexts of single queries remain.

        A network stores `MAX_EXECUTION_STATES` contexts and releases the least recently used.
        """
        for batch in sorted(set(batches), reverse=True):
            for length in sorted(set(lengths), reverse=True):
                yield self.network_for(length), {"batch": batch, "query_length": length}

    @property
    def largest_batch(self) -> int:
        """Return the maximum number of queries that run together."""
        return self._network.max_size("batch")

    @property
    def longest_query(self) -> int:
        """Return the maximum query length in tokens."""
        return self._network.query_length.max

    def network_for(self, length: int) -> TensorRTEngine:
        """Return the fastest network for queries of at most `length` tokens; ShapeError if there is none."""
        for network in self._active_plans:
            if length <= network.query_length.max:
                return network
        min_length, _, max_length = self._network.query_length
        command = engine_compatibility.rebuild_command(self._network.path, self._network.sidecar, length)
        raise ShapeError(
            f"Expected a query of {min_length} to {max_length} tokens, got {length}. Shorten the query, or build the "
            f"engine for longer ones: `{command}`.",
            code="query_length_out_of_range",
        )


class TensorRTBackend(_QueryModel):
    """Run a model that was not split; see `Backend`."""

    def run(self, batch: Batch) -> Heads:
        """Return the heads of a batch, run in parts if it exceeds the largest profile."""
        check_numbers(batch.query_tokens, batch.query_length, len(self.manifest.vocabulary))
        length = int(batch.query_length.max(initial=1))
        network = self.network_for(length)
        tokens = batch.query_tokens[:, :length]

        def run(rows: np.ndarray) -> Mapping[str, np.ndarray]:
            index = as_slice(rows)
            inputs = {
                "query_tokens": tokens[index],
                "query_length": batch.query_length[index],
                "segment_features": batch.segment_features[index],
                SPANS: batch.segment_spans[index],
            }
            return network.run(inputs, {"batch": len(rows), "query_length": length})

        outputs = self._run_parts(row_slices(len(batch), network.max_size("batch")), run)
        return gather_rows(len(batch), outputs, network.empty_outputs)


class TensorRTPair(_QueryModel):
    """Run a split model, whose query plans store encodings on the device; see `PairBackend`."""

    def __init__(
        self,
        manifest: Manifest,
        query: TensorRTEngine,
        video: TensorRTEngine,
        short_query_networks: Sequence[TensorRTEngine] = (),
    ) -> None:
        super().__init__(manifest, query, video, short_query_networks=short_query_networks)
        self._video = video
        # By network and number of slots: each plan has encodings of its own, and profiles may differ.
        self._slots = {
            network: {slots: EncodingSlots(slots) for slots, _ in network.buffers.encodings}
            for network in (query, *short_query_networks)
        }
        self._largest_ranges = {
            network: max(network.profiles, key=lambda profile: profile.ranges["batch"].max).ranges
            for network in (query, *short_query_networks)
        }
        self._calls = itertools.count(1)

    def _requests(
        self, batches: Sequence[int], lengths: Sequence[int]
    ) -> Iterator[tuple[TensorRTEngine, dict[str, int]]]:
        # Videos are encoded one at a time. The video axis of a query plan is always padded to its maximum.
        yield self._video, {"video": 1}
        for network, sizes in super()._requests(batches, lengths):
            yield network, {**sizes, "video": 1}

    def encode(self, segment_features: np.ndarray) -> np.ndarray:
        """Return the encodings of V videos, (V, D, T) float32 or float16, from their (V, T, D) float32 segments."""
        encoded = self._run_one_input(self._video, "video", "segment_features", segment_features, ENCODED_FEATURES)
        return from_bfloat16(encoded) if self._video.is_bfloat16 else encoded

    def ask(
        self,
        query_tokens: np.ndarray,
        query_length: np.ndarray,
        videos: Sequence[EncodedVideo],
        video_index: np.ndarray,
    ) -> Heads:
        """Return the heads of B queries; see `PairBackend.ask` for shapes.

        Encodings that are not on the GPU are copied there; videos of equal `key` share one copy.
        """
        check_numbers(query_tokens, query_length, len(self.manifest.vocabulary), video_index, len(videos))
        length = int(query_length.max(initial=1))
        network = self.network_for(length)
        tokens = query_tokens[:, :length]
        max_rows, max_videos = (self._largest_ranges[network][axis].max for axis in ("batch", "video"))

        def run(rows: np.ndarray) -> Mapping[str, np.ndarray]:
            index = as_slice(rows)
            referenced, row_videos = referenced_videos(video_index[index], len(videos), max_videos)
            sizes = {"batch": len(rows), "query_length": length, "video": len(referenced)}
            profile, _ = network.choose(sizes)
            num_slots = profile.ranges["video"].max
            slots = self._acquire_slots(network, [videos[video] for video in referenced], num_slots)
            inputs = {
                "query_tokens": tokens[index],
                "query_length": query_length[index],
                VIDEO_INDEX: slots[row_videos],
            }
            return network.run(inputs, sizes)

        outputs = self._run_parts(row_slices_by_video(video_index, max_rows, max_videos, len(videos)), run)
        return gather_rows(len(query_length), outputs, network.empty_outputs)

    def run(self, batch: Batch) -> Heads:
        """Return the heads of a batch, each row with a video of its own; see `Backend.run` for shapes."""
        # Keys that no other call uses, also not in another thread, because these videos are not cached.
        call = next(self._calls)
        videos = [
            EncodedVideo(encoded, spans, 1.0, key=f"row {row} of call {call}")
            for row, (encoded, spans) in enumerate(zip(self.encode(batch.segment_features), batch.segment_spans))
        ]
        return self.ask(batch.query_tokens, batch.query_length, videos, np.arange(len(batch), dtype=np.int32))

    def _acquire_slots(self, network: TensorRTEngine, videos: Sequence[EncodedVideo], num_slots: int) -> np.ndarray:
        """Return the slots of V videos, (V,) int32, after copying those that are not on the device."""
        cache = self._slots[network][num_slots]
        slots, missing = cache.acquire([video.key for video in videos])
        try:
            for index in missing:
                self._upload(network, videos[index], int(slots[index]), num_slots)
        except BaseException:
            cache.clear()
            raise
        return slots

    @staticmethod
    def _upload(network: TensorRTEngine, video: EncodedVideo, slot: int, num_slots: int) -> None:
        features = to_bfloat16(video.features) if network.is_bfloat16 else video.features
        for name, array in ((ENCODED_FEATURES, features), (SPANS, video.spans)):
            staging = network.buffers.staging[num_slots, name][slot]
            if array.shape != staging.shape:
                raise ShapeError(
                    f"Expected {name} of shape {staging.shape} in the encoding of {video.name}, got {array.shape}. "
                    "Encode the video with this model."
                )
            staging[...] = array
            network.buffers.upload(name, num_slots, slot)
