"""TensorRT and TensorRT-RTX engines: whole models, pairs that keep encoded videos on the GPU, and extractors.

One call runs at a time: threads may share a model, and wait for each other. What is decided is in
`runtime.backends.engine_compatibility` and `runtime.backends.batch_shapes`; `runtime.backends.tensorrt_engine` carries
it out.
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
from runtime.artifacts.extractor_manifest import ExtractorManifest, ExtractorSidecar
from runtime.artifacts.manifest import Manifest
from runtime.backends import engine_compatibility
from runtime.backends.batch_shapes import referenced_videos, row_slices, row_slices_by_video
from runtime.backends.cuda_driver import Cuda, OutOfDeviceMemory
from runtime.backends.encoding_cache import EncodingSlots, gather_rows
from runtime.backends.tensorrt_engine import SPANS, TensorRTEngine
from runtime.backends.tensorrt_model import PlanUse, TensorRTModel, as_slice
from runtime.core.batch import ENCODED_FEATURES, VIDEO_INDEX, Batch, Heads
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
    """Open a plan, or the pair of plans that a query part belongs to.

    Args:
        path: the `.engine` file; its sidecar is in the same directory.
        device: an engine runs on a GPU only, so `cpu` is an error.
        threads: has no meaning for a GPU.
        library, cuda: stand in for the TensorRT module and the driver.

    Raises:
        ModelFileError: the plan does not match its sidecar, or is not a DRN engine.
        DeviceError: the plan was built for another library, version or GPU, or there is none.
    """
    del threads
    sidecar = read_sidecar(path)
    part = sidecar.manifest.part
    _check_device(path, device)
    if part == "video":
        raise ModelFileError(
            f"{path} is the video part of a model, which answers nothing by itself; give the query part "
            "(its name ends in .query.engine).",
            code="model_part",
        )
    siblings = [(path, sidecar)]
    if part == "query":
        siblings.append(locate_video_part(path, sidecar))
    shorter = short_query_plans(path, sidecar)
    networks = []
    try:
        for plan, about in siblings:
            cuda, library = _ready(plan, about, cuda, library)
            networks.append(TensorRTEngine(library, cuda, plan, about))
        for plan, about in shorter:
            cuda, library = _ready(plan, about, cuda, library)
            try:
                networks.append(TensorRTEngine(library, cuda, plan, about))
            except DeviceMemoryError as error:
                log.warning("%s %s", error, _without(plan, path))
    except BaseException:
        for network in networks:
            network.close()
        raise
    if part == "query":
        return TensorRTPair(sidecar.manifest, networks[0], networks[1], shorter=networks[2:])
    return TensorRTBackend(sidecar.manifest, networks[0], shorter=networks[1:])


def open_extractor_engine(
    path: Path, device: Device = "auto", *, library: Any = None, cuda: Cuda | None = None
) -> TensorRTExtractor:
    """Open a plan that makes clip features; raises as `open_engine`, whose arguments these are."""
    content = read_verified(path)
    sidecar = ExtractorSidecar(ExtractorManifest.from_dict(content["manifest"], str(metadata_path(path))), content)
    _check_device(path, device)
    cuda, library = _ready(path, sidecar, cuda, library)
    # Of the plan and of all that the sidecar says.
    identity = json_digest([content["sha256"][path.name], content["digest"]])
    return TensorRTExtractor(TensorRTEngine(library, cuda, path, sidecar), sidecar.manifest, identity)


def _check_device(path: Path, device: Device) -> None:
    if device == "cpu":
        raise DeviceError(
            f"{path.name} is an engine, which runs on a GPU only; give the .onnx file for the CPU.", code="gpu_required"
        )


def locate_video_part(path: Path, sidecar: Sidecar) -> tuple[Path, Sidecar]:
    """The plan of the video part: named by itself or by the graph it was built from, whose hash its sidecar has."""
    if len(sidecar.manifest.video_part) != 1:
        raise ModelFileError(
            f"The sidecar of {path} should name one video part; build both parts again.", code="missing_part"
        )
    ((name, digest),) = sidecar.manifest.video_part.items()
    plan = path.with_name(Path(name).name).with_suffix(".engine")
    if not plan.is_file():
        raise ModelFileError(
            f"{path} needs its video part {plan.name} beside it, and there is none; copy it there.", code="missing_file"
        )
    result = read_sidecar(plan)
    if digest not in result.content["sha256"].values():
        raise ModelFileError(
            f"{plan} is not the video part that {path.name} was made with; copy both files of one build, or build both "
            f"again: `{engine_compatibility.rebuild_command(path, sidecar)}`.",
            code="digest_mismatch",
        )
    return plan, result


def _without(shorter: Path, path: Path) -> str:
    """Return what it costs to run an engine without one of its plans for short queries, as a sentence."""
    tokens = "".join(
        f" of at most {steps} tokens" for steps in engine_compatibility.unrolled_steps({"unrolled": [shorter.name]})
    )
    return (
        f"{path.name} runs without {shorter.name}: queries{tokens} are answered by a plan for longer ones, which takes "
        "more time for each."
    )


def short_query_plans(path: Path, sidecar: Sidecar) -> list[tuple[Path, Sidecar]]:
    """Return the plans for short queries that were built with a plan, by the names and hashes that its sidecar has.

    A plan that is not there, or has no sidecar, is a warning: a longer plan gives the same answers.

    Raises:
        ModelFileError: a plan is not the one that was built with it, or its sidecar is damaged.
    """
    results = []
    for name, digest in sidecar.content.get("unrolled", {}).items():
        plan = path.with_name(Path(name).name)
        missing = next((file for file in (plan, metadata_path(plan)) if not file.is_file()), None)
        if missing:
            log.warning("%s is missing. %s Copy it there.", missing, _without(plan, path))
            continue
        about = read_sidecar(plan)
        if about.content["sha256"][plan.name] != digest or about.manifest.part != sidecar.manifest.part:
            raise ModelFileError(
                f"{plan} is not the plan that {path.name} was built with; copy the files of one build, or build them "
                f"again: `{engine_compatibility.rebuild_command(path, sidecar)}`.",
                code="digest_mismatch",
            )
        results.append((plan, about))
    return results


def _ready(plan: Path, sidecar: EngineMetadata, cuda: Cuda | None, library: Any) -> tuple[Cuda, Any]:
    """Return the driver and the library that run a plan, or say why this machine cannot.

    CUDA comes first: without it TensorRT 8.6 returns nulls, and a lean TensorRT 11 dies at the first use.
    """
    reasons = ["", ""]
    if cuda is None:
        try:
            cuda = Cuda()
        except DeviceError as error:
            reasons[0] = str(error).rstrip(".")
    if library is None and cuda is not None:
        library, reasons[1] = _import(engine_compatibility.libraries(sidecar.content))
    machine = engine_compatibility.HostInfo(
        f"{library.__name__} {library.__version__}" if library is not None else None,
        cuda.name if cuda is not None else None,
        cuda.capability if cuda is not None else None,
        why_no_library=reasons[1],
        why_no_gpu=reasons[0],
    )
    reason = engine_compatibility.incompatibility(plan, sidecar, machine)
    if reason is not None:
        raise DeviceError(reason, code="incompatible_engine")
    assert cuda is not None
    return cuda, library


def _import(names: Sequence[str]) -> tuple[Any, str]:
    reasons = [] if names else ["its target is not known to this version"]
    for name in names:
        try:
            return importlib.import_module(name), ""
        except ImportError as error:
            reasons.append(str(error))
    return None, "; ".join(reasons)


class TensorRTExtractor(TensorRTModel):
    """A network of clips as one engine: C3D of `export.build_engine`."""

    def __init__(self, network: TensorRTEngine, manifest: ExtractorManifest, identity: str) -> None:
        super().__init__(network)
        self.manifest = manifest
        self.identity = identity

    def extract(self, clips: np.ndarray) -> np.ndarray:
        """Return (N, D) float32 features; see `Extractor`. Raises as `TensorRTBackend.run`."""
        return self._in_pieces(self._network, "batch", "clips", clips, "features")


class _Grounding(TensorRTModel):
    """Run queries through the engines of a model; base of the whole and the split form.

    Args:
        manifest: of the model.
        networks: what reads queries of any length, and for a pair what encodes videos.
        shorter: what reads short queries only, and faster.
    """

    def __init__(self, manifest: Manifest, *networks: TensorRTEngine, shorter: Sequence[TensorRTEngine] = ()) -> None:
        super().__init__(*networks, *shorter)
        self.manifest = manifest
        self._plans = sorted((*shorter, networks[0]), key=lambda network: network.query_length.max)
        # Those that answer; `only` limits them.
        self._by_length = self._plans
        networks[0].answers_above = max((network.query_length.max for network in shorter), default=0)

    def plan_uses(self) -> list[PlanUse]:
        """Return what each plan that answers queries was used for, the plan for the shortest queries first."""
        return [PlanUse(network.path.name, network.query_length.max, network.rows_answered) for network in self._plans]

    @property
    def first_lengths(self) -> list[int]:
        """Tokens of the shortest query that each plan answers, ascending: with these lengths no plan is left out."""
        return [1, *(network.query_length.max + 1 for network in self._plans[:-1])]

    @contextlib.contextmanager
    def only(self, plan: str) -> Iterator[None]:
        """Let one plan answer every query, so that it can be checked alone; for one thread.

        Queries beyond its longest raise ShapeError.

        Args:
            plan: file name, of `plan_uses`.
        """
        self._by_length = [network for network in self._plans if network.path.name == plan]
        try:
            yield
        finally:
            self._by_length = self._plans

    def warm(
        self, batches: Sequence[int], lengths: Sequence[int], progress: Callable[[int, int], None] = lambda *_: None
    ) -> int:
        """Make the contexts and CUDA graphs for queries of these sizes; see `Grounder.warm`."""
        requests: dict[Any, tuple[TensorRTEngine, dict[str, int]]] = {}
        for network, sizes in self._requests(batches, lengths):
            requests.setdefault((network, network.key(sizes)), (network, sizes))
        for done, (network, sizes) in enumerate(requests.values()):
            progress(done, len(requests))
            with self._turn():
                self._reset_clock()
                try:
                    network.warm(sizes)
                except OutOfDeviceMemory as error:
                    raise DeviceMemoryError(
                        f"The GPU's memory is full after {done} of {len(requests)} sizes. Warm fewer sizes, or build "
                        "the engine for fewer queries (--batch)."
                    ) from error
        with self._turn():
            for network in self._networks:
                network.contexts.save_kernels()
        progress(len(requests), len(requests))
        return len(requests)

    def _requests(
        self, batches: Sequence[int], lengths: Sequence[int]
    ) -> Iterator[tuple[TensorRTEngine, dict[str, int]]]:
        """Yield the networks and sizes that queries meet, large batches first.

        A network keeps `MAX_EXECUTION_STATES` contexts, and those of single queries must not be the ones given back.
        """
        for batch in sorted(set(batches), reverse=True):
            for longest in sorted(set(lengths), reverse=True):
                yield self.network_for(longest), {"batch": batch, "query_length": longest}

    @property
    def largest_batch(self) -> int:
        """Queries that go through together at most."""
        return max(profile.ranges["batch"].max for profile in self._network.domains)

    @property
    def longest_query(self) -> int:
        """Tokens of the longest query."""
        return self._network.query_length.max

    def network_for(self, longest: int) -> TensorRTEngine:
        """Return what reads queries of so many tokens at most; ShapeError if the engine was built for shorter ones."""
        for network in self._by_length:
            if longest <= network.query_length.max:
                return network
        shortest, best, most = self._network.query_length
        command = engine_compatibility.rebuild_command(self._network.path, self._network.sidecar, longest)
        raise ShapeError(
            f"The query has {longest} tokens and this engine takes {shortest} to {most} (best {best}); shorten it, "
            f"or rebuild: `{command}`.",
            code="query_length_out_of_range",
        )


class TensorRTBackend(_Grounding):
    """A whole model as one engine."""

    def run(self, batch: Batch) -> Heads:
        """Return the heads of a batch; what is beyond the largest profile goes in pieces.

        Raises:
            ShapeError: the arrays do not fit the engine.
            DeviceError: the GPU's memory is full, the GPU failed, or this process was forked after it was opened.
        """
        longest = int(batch.query_length.max(initial=1))
        network = self.network_for(longest)
        tokens = batch.query_tokens[:, :longest]

        def some(rows: np.ndarray) -> Mapping[str, np.ndarray]:
            part = as_slice(rows)
            arrays = {
                "query_tokens": tokens[part],
                "query_length": batch.query_length[part],
                "segment_features": batch.segment_features[part],
                SPANS: batch.segment_spans[part],
            }
            return network.run(arrays, {"batch": len(rows), "query_length": longest})

        most = max(profile.ranges["batch"].max for profile in network.domains)
        with self._turn():
            self._reset_clock()
            answers = [
                answer
                for part in row_slices(len(batch), most)
                for answer in self._answer(np.arange(part.start, part.stop), some)
            ]
        return gather_rows(len(batch), answers, network.nothing)


class TensorRTPair(_Grounding):
    """The two engines of a model that was split; the query part keeps encodings on the device, by their key."""

    def __init__(
        self, manifest: Manifest, query: TensorRTEngine, video: TensorRTEngine, shorter: Sequence[TensorRTEngine] = ()
    ) -> None:
        super().__init__(manifest, query, video, shorter=shorter)
        self._video = video
        # Each engine stores encodings of its own, by how many its profiles take.
        self._slots = {
            network: {slots: EncodingSlots(slots) for slots, _ in network.buffers.encodings}
            for network in (query, *shorter)
        }
        self._largest = {
            network: max(network.domains, key=lambda profile: profile.ranges["batch"].max).ranges
            for network in (query, *shorter)
        }
        self._calls = itertools.count(1)

    def _requests(
        self, batches: Sequence[int], lengths: Sequence[int]
    ) -> Iterator[tuple[TensorRTEngine, dict[str, int]]]:
        # Videos are encoded one by one; the query part always takes all that it keeps.
        yield self._video, {"video": 1}
        for network, sizes in super()._requests(batches, lengths):
            yield network, {**sizes, "video": 1}

    def encode(self, segment_features: np.ndarray) -> np.ndarray:
        """Return (V, D, T) encoded features of (V, T, D) float32 segments; raises as `TensorRTBackend.run`."""
        encoded = self._in_pieces(self._video, "video", "segment_features", segment_features, ENCODED_FEATURES)
        return from_bfloat16(encoded) if self._video.half_bits else encoded

    def ask(
        self,
        query_tokens: np.ndarray,
        query_length: np.ndarray,
        videos: Sequence[EncodedVideo],
        video_index: np.ndarray,
    ) -> Heads:
        """Return the heads of B queries, (B, L) and (B,) int32, each about the video that `video_index`, (B,), says.

        A video is copied to the GPU when it is not there; its key stands for its content. Raises as
        `TensorRTBackend.run`.
        """
        longest = int(query_length.max(initial=1))
        network = self.network_for(longest)
        tokens = query_tokens[:, :longest]

        def some(rows: np.ndarray) -> Mapping[str, np.ndarray]:
            part = as_slice(rows)
            needed, which = referenced_videos(video_index[part], len(videos), most_videos)
            sizes = {"batch": len(rows), "query_length": longest, "video": len(needed)}
            profile, _ = network.choose(sizes)
            slots = self._acquire_slots(network, [videos[index] for index in needed], profile.ranges["video"].max)
            arrays = {
                "query_tokens": tokens[part],
                "query_length": query_length[part],
                VIDEO_INDEX: slots[which],
            }
            return network.run(arrays, sizes)

        largest, most_videos = self._largest[network]["batch"].max, self._largest[network]["video"].max
        with self._turn():
            self._reset_clock()
            answers = [
                answer
                for rows in row_slices_by_video(video_index, largest, most_videos, len(videos))
                for answer in self._answer(rows, some)
            ]
        return gather_rows(len(query_length), answers, network.nothing)

    def run(self, batch: Batch) -> Heads:
        """Return the heads of a batch, as the whole model would; raises as `TensorRTBackend.run`."""
        # No video comes again, and none may be taken for one of another call, in whichever thread.
        call = next(self._calls)
        videos = [
            EncodedVideo(encoded, spans, 1.0, key=f"row {row} of call {call}")
            for row, (encoded, spans) in enumerate(zip(self.encode(batch.segment_features), batch.segment_spans))
        ]
        return self.ask(batch.query_tokens, batch.query_length, videos, np.arange(len(batch), dtype=np.int32))

    def _acquire_slots(self, network: TensorRTEngine, videos: Sequence[EncodedVideo], most: int) -> np.ndarray:
        """Return the slots of videos, (V,) int32, after copying those that are not on the device."""
        cache = self._slots[network][most]
        slots, missing = cache.acquire([video.key for video in videos])
        try:
            for position in missing:
                self._upload(network, videos[position], int(slots[position]), most)
        except BaseException:
            cache.clear()
            raise
        return slots

    @staticmethod
    def _upload(network: TensorRTEngine, video: EncodedVideo, slot: int, most: int) -> None:
        features = to_bfloat16(video.features) if network.half_bits else video.features
        for name, array in ((ENCODED_FEATURES, features), (SPANS, video.spans)):
            staged = network.buffers.staged[most, name][slot]
            if array.shape != staged.shape:
                raise ShapeError(
                    f"The encoding of {video.name} has {name} of shape {array.shape} and this engine takes "
                    f"{staged.shape}; encode the video with this model."
                )
            staged[...] = array
            network.buffers.upload(name, most, slot)
