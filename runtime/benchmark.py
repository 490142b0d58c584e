"""`python -m runtime.benchmark`: how fast a model is here, at three boundaries, and what takes the time."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, cast

import numpy as np
from tqdm import tqdm

from runtime.artifacts.encoded_video import EncodedVideo
from runtime.artifacts.engine_metadata import read_content
from runtime.artifacts.manifest import Manifest
from runtime.backends.base import MOST_THREADS, Device, PairBackend
from runtime.benchmarking import system_info
from runtime.benchmarking.report import (
    BATCH_SIZE,
    LENGTH,
    ONE_QUERY,
    PER_VIDEO,
    Agreement,
    Boundary,
    Case,
    Memory,
    Phases,
    Report,
    Subject,
    Timing,
    draw,
)
from runtime.benchmarking.timing import TOLERANCE, Call, Clock, Latency, WarmUp, speed_ratio, take_turns, warm_up
from runtime.core import cpu_info
from runtime.core.batch import collate, padded
from runtime.core.cli import check_plots, command, next_command
from runtime.core.decoding import PUBLISHED_COUNT, propose, suppress
from runtime.core.errors import DeviceError, GroundingError, ModelFileError, QueryError
from runtime.core.io.files import check_file, check_report, sha256, write_json
from runtime.core.moments import Moment, temporal_iou
from runtime.core.tokenizer import tokenize
from runtime.core.video import Video
from runtime.datasets.dataset import Annotation, DataSet
from runtime.grounding.grounder import Grounder, in_seconds

log = logging.getLogger("drn")

SAMPLES = 500
MOST_BATCH = 4096
# A sweep's cases end after so many seconds each, though not before so many calls.
SWEEP_SECONDS, FEWEST_CALLS = 5.0, 10
# Queries that cases take turns with, and videos, where they are made up.
QUERIES, VIDEOS = 64, 8
MOST_VIDEOS = 64
# A border that moves by less cannot be seen in tenths of a second.
VISIBLE_S = 0.05

Pair = tuple[Union[Video, EncodedVideo], str]


def benchmark(
    model: Path | None = None,
    *,
    compare: tuple[Path, ...] = (),
    data: Path | None = None,
    video: str | None = None,
    query: tuple[str, ...] = (),
    samples: int = SAMPLES,
    batch: int = 32,
    device: Device = "auto",
    threads: int | None = None,
    output: Path | None = None,
    plot: Path | None = None,
) -> Report:
    """Time a model: on the GPU, on the host, end to end; over batch sizes, queries per video, query lengths, phases.

    Several models take turns, call by call, and are compared in ratios of one run. Ctrl-C ends it early and keeps what
    was measured.

    Args:
        model: .onnx, .engine or .pt file; of a model that was split, the query part.
        compare: more models, which take turns with it; ratios are against the first of all.
        data: directory of a data set (docs/formats.md), whose videos and sentences are asked; made up when not given.
        video: a video of it, in place of many.
        query: sentences to ask about that video, in place of its own.
        samples: calls of every case of one query; the other cases take as many, or what fits into five seconds.
        batch: largest batch, and most queries per video.
        device: auto, cpu or cuda.
        threads: CPU threads for each network.
        output: JSON file for everything that was found.
        plot: PNG file for percentiles and curves.

    Raises:
        GroundingError: an input is wrong; said before anything is measured, where it can be known then.
    """
    models = [path for path in (model, *compare) if path is not None]
    _check(models, data, video, query, samples, batch, threads, output, plot)
    told = _command(models, data, video, query, samples, batch, device, threads)
    run = _Run(models, samples, batch, device, threads, told)
    interruption: KeyboardInterrupt | None = None
    try:
        run.measure(data, video, query)
    except KeyboardInterrupt as error:
        interruption = error
    report = run.report(interruption is not None)
    print(report.text())
    if output:
        write_json(output, report.to_dict())
    if plot:
        draw(report, plot)
    if interruption is not None:
        raise interruption
    next_command("runtime.evaluate", "--model", models[0], "--data", data or "DIR")
    return report


def _check(
    models: Sequence[Path],
    data: Path | None,
    video: str | None,
    query: Sequence[str],
    samples: int,
    batch: int,
    threads: int | None,
    output: Path | None,
    plot: Path | None,
) -> None:
    """Refuse what cannot work before anything is opened."""
    if not models:
        raise ModelFileError("No model was named; pass --model FILE, or --compare FILE FILE.")
    if samples < 1:
        raise GroundingError(f"--samples must be at least 1, and {samples} was given.")
    if not 1 <= batch <= MOST_BATCH:
        raise GroundingError(f"--batch must be 1 to {MOST_BATCH}, and {batch} was given.")
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise DeviceError(f"--threads must be 1 to {MOST_THREADS}, and {threads} was given.")
    if video is not None and data is None:
        raise GroundingError("--video names a video of a data set; pass --data DIR too.")
    if query and video is None:
        raise QueryError("--query asks about one video; pass --data DIR and --video NAME too.")
    for path in models:
        check_file(path, "The model file", ModelFileError)
    read = (*models, *(DataSet(data).files if data else ()))
    check_report(output, *read, plot)
    check_report(plot, *read)
    if plot:
        check_plots(plot)


def _command(
    models: Sequence[Path],
    data: Path | None,
    video: str | None,
    query: Sequence[str],
    samples: int,
    batch: int,
    device: Device,
    threads: int | None,
) -> str:
    """Return the command that does the same again."""
    words: list[Any] = ["python", "-m", "runtime.benchmark", "--model", models[0]]
    words += ["--compare", *models[1:]] if models[1:] else []
    words += ["--samples", samples, "--batch", batch, "--device", device]
    for option, value in (("--data", data), ("--video", video), ("--threads", threads)):
        words += [option, value] if value is not None else []
    words += ["--query", *query] if query else []
    return shlex.join(map(str, words))


@dataclasses.dataclass(frozen=True)
class Questions:
    """What is asked, over and over.

    Attributes:
        pairs: videos and sentences.
        told: what they are, in a sentence.
        made_up: whether they are not of a data set.
    """

    pairs: Sequence[tuple[Video, str]]
    told: str
    made_up: bool

    def to_dict(self) -> dict[str, Any]:
        videos = {id(video) for video, _ in self.pairs}
        return {"told": self.told, "made_up": self.made_up, "queries": len(self.pairs), "videos": len(videos)}


def made_up_questions(manifests: Sequence[Manifest], batch: int = 1) -> Questions:
    """Return videos of half a minute with features as sparse as C3D's, and sentences of words that all models know.

    Raises:
        GroundingError: the models take features of different widths, or have no word in common.
    """
    features = manifests[0].features
    words = [word for word in manifests[0].vocabulary.words if word.isalnum() and tokenize(word) == [word]]
    words = [word for word in words if all(word in manifest.vocabulary.words for manifest in manifests)]
    if not words:
        raise QueryError("The models have no word in common; compare models of one vocabulary, or pass --data.")
    rng = np.random.default_rng(0)
    videos = []
    for index in range(min(max(VIDEOS, batch), MOST_VIDEOS)):
        clips = np.maximum(rng.standard_normal((110, features.dim), np.float32) - 0.84, 0).astype(np.float16)
        videos.append(Video(clips, features.clock.num_frames(len(clips)), 30.0, f"video {index}"))
    longest = min(manifest.max_query_length for manifest in manifests)
    pairs = []
    for index in range(max(QUERIES, batch)):
        # 3 to 10 words, as the published sentences mostly have.
        length = min(3 + index % 8, longest)
        pairs.append((videos[index % len(videos)], " ".join(rng.choice(words, length))))
    told = (
        f"Inputs are made up: {len(pairs)} sentences of 3 to 10 words of the model's own, {len(videos)} videos of 110 "
        f"clips of width {features.dim}."
    )
    return Questions(pairs, told, made_up=True)


def data_questions(directory: Path, video: str | None, queries: Sequence[str]) -> Questions:
    """Return sentences and videos of a data set: those named, those of the video named, or some of the whole set.

    Raises:
        GroundingError: the data set or the video cannot be read.
    """
    data_set = DataSet(directory)
    if queries:
        assert video is not None
        subject = data_set.video(video)
        pairs = [(subject, query) for query in queries]
        return Questions(pairs, f"{len(pairs)} sentences given, about {video} of {directory}.", made_up=False)
    splits = [name for name in ("test", "val", "train") if name in data_set.splits] or ["test"]
    chosen: list[Annotation] = []
    for split in splits if video is not None else splits[:1]:
        chosen += data_set.annotations(split, invalid="drop", quiet=True)
    if video is not None:
        # Asked first, so that an unknown name is refused with its own sentence.
        data_set.video(video)
        chosen = [annotation for annotation in chosen if annotation.video == video]
        if not chosen:
            raise QueryError(f"{directory} holds no sentence about {video}; pass --query too.")
    chosen = chosen[:: max(1, len(chosen) // QUERIES)][:QUERIES]
    videos = {name: data_set.video(name) for name in dict.fromkeys(annotation.video for annotation in chosen)}
    pairs = [(videos[annotation.video], annotation.sentence) for annotation in chosen]
    simulated = " (features are simulated)" if data_set.simulated else ""
    told = f"{len(pairs)} sentences about {len(videos)} videos of {directory}{simulated}."
    return Questions(pairs, told, made_up=False)


def _askable(pairs: Sequence[tuple[Video, str]], grounders: Sequence[Grounder]) -> list[tuple[Video, str]]:
    """Return the pairs whose sentences have content words that the models know; QueryError if there is none."""
    asked: list[tuple[Video, str]] = []
    problem: QueryError | None = None
    for video, sentence in pairs:
        try:
            for grounder in grounders:
                grounder.encode_query(sentence, Counter())
        except QueryError as error:
            if error.code != "unknown_content_words":
                raise
            problem = error
        else:
            asked.append((video, sentence))
    if problem is not None and not asked:
        raise problem
    if problem is not None:
        log.warning("%d of %d sentences are not asked; the last: %s", len(pairs) - len(asked), len(pairs), problem)
    return asked


def sizes(most: int) -> list[int]:
    """Return 1, 2, 4 and so on up to `most`, which comes last."""
    powers = [1 << exponent for exponent in range(most.bit_length()) if 1 << exponent < most]
    return [*powers, most]


def labels(paths: Sequence[Path]) -> list[str]:
    """Return a name for each model: its file's, or its path where names are equal, numbered where paths are."""
    names = [path.name if [other.name for other in paths].count(path.name) == 1 else str(path) for path in paths]
    return [
        name if names.count(name) == 1 else f"{name} ({names[: index + 1].count(name)})"
        for index, name in enumerate(names)
    ]


def files_of(path: Path, manifest: Manifest) -> list[Path]:
    """Return the files that a model consists of, the one named first."""
    parts = [path.with_name(Path(name).name) for name in (*manifest.video_part, *manifest.prepared_parts)]
    if path.suffix == ".engine":
        # Parts are named as the graphs they were built from.
        parts = [part.with_suffix(".engine") for part in parts]
        unrolled = read_content(path).get("unrolled", ()) if path.is_file() else ()
        parts += [path.with_name(Path(name).name) for name in unrolled]
    return [path, *(part for part in parts if part.is_file())]


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A model that is open, and what it is asked.

    Attributes:
        label: how tables call it.
        grounder: the model.
        pairs: videos and sentences.
        known: the same, with encodings in place of videos where the model takes them, else videos already pooled.
    """

    label: str
    grounder: Grounder
    pairs: Sequence[tuple[Video, str]]
    known: Sequence[Pair]

    @classmethod
    def of(cls, label: str, grounder: Grounder, pairs: Sequence[tuple[Video, str]]) -> Model:
        seen: dict[int, Video | EncodedVideo] = {}
        for video, query in pairs:
            grounder.encode_query(query)
            if id(video) not in seen:
                segments, about = grounder.segments(video), (video.duration, video.name)
                seen[id(video)] = grounder.encode_segments(segments, *about) if grounder.is_pair else video
        return cls(label, grounder, pairs, [(seen[id(video)], query) for video, query in pairs])

    def fresh(self, first: int, count: int) -> list[tuple[Video, str]]:
        """Return so many pairs in turn, whose videos were never seen."""
        chosen = self._chosen(self.pairs, first, count)
        videos = {id(video): dataclasses.replace(video) for video, _ in chosen}
        return [(videos[id(video)], query) for video, query in chosen]

    def again(self, first: int, count: int) -> list[Pair]:
        """Return so many pairs in turn, whose videos are known."""
        return self._chosen(self.known, first, count)

    def network(self, pairs: Sequence[Pair]) -> Callable[[Any], Any]:
        """Return what runs the network alone, with its copies, for known pairs."""
        return self.asked([self.grounder.encode_query(query) for _, query in pairs], [video for video, _ in pairs])

    def asked(self, queries: Sequence[np.ndarray], videos: Sequence[Video | EncodedVideo]) -> Callable[[Any], Any]:
        """Return what runs the network alone for word ids and known videos."""
        backend = self.grounder.backend
        if not self.grounder.is_pair:
            batch = collate(queries, [self.grounder.segments(cast(Video, video)) for video in videos])
            return lambda _: backend.run(batch)
        distinct, index = _distinct(cast("Sequence[EncodedVideo]", videos))
        tokens, lengths = padded(queries)
        pair = cast(PairBackend, backend)
        return lambda _: pair.ask(tokens, lengths, distinct, index)

    @property
    def tells_gpu(self) -> bool:
        """Whether its backend can say how long the GPU took."""
        return hasattr(self.grounder.backend, "time_gpu")

    @property
    def device(self) -> str:
        """cpu or cuda, as its backend or the backend's network says."""
        backend: Any = self.grounder.backend
        parameters = getattr(getattr(backend, "model", None), "parameters", None)
        # torch's modules have no device, but their parameters do.
        device = next(parameters()).device if parameters else getattr(backend, "device", "unknown")
        return str(device).partition(":")[0]

    @staticmethod
    def _chosen(pairs: Sequence[Any], first: int, count: int) -> list[Any]:
        return [pairs[(first * count + index) % len(pairs)] for index in range(count)]


def _distinct(videos: Sequence[EncodedVideo]) -> tuple[list[EncodedVideo], np.ndarray]:
    """Return each video once, and for each of all its index among them, (B,) int32."""
    once = {id(video): video for video in videos}
    place = {key: index for index, key in enumerate(once)}
    return list(once.values()), np.array([place[id(video)] for video in videos], np.int32)


def walk(
    grounder: Grounder, pairs: Sequence[tuple[Video, str]], clock: Clock = time.perf_counter
) -> tuple[list[list[Moment]], dict[str, float]]:
    """Answer pairs in one batch, as `Grounder.ground_batch` does, and return the answers and seconds of every phase."""
    decoding, seconds = grounder.manifest.decoding, {}
    last = clock()

    def mark(phase: str) -> None:
        nonlocal last
        now = clock()
        seconds[phase] = now - last
        last = now

    known = {query: grounder.encode_query(query) for query in dict.fromkeys(query for _, query in pairs)}
    tokens = [known[query] for _, query in pairs]
    mark("tokenise")
    videos = {id(video): video for video, _ in pairs}
    segments = {key: grounder.segments(video) for key, video in videos.items()}
    mark("segment")
    if grounder.is_pair:
        pair = cast(PairBackend, grounder.backend)
        encoded = {
            key: grounder.encode_segments(found, videos[key].duration, videos[key].name)
            for key, found in segments.items()
        }
        mark("encode")
        distinct, index = _distinct([encoded[id(video)] for video, _ in pairs])
        ids, lengths = padded(tokens)
        mark("collate")
        heads = pair.ask(ids, lengths, distinct, index)
    else:
        batch = collate(tokens, [segments[id(video)] for video, _ in pairs])
        mark("collate")
        heads = grounder.backend.run(batch)
    mark("network")
    proposals = propose(heads, decoding)
    mark("decode")
    picks = suppress(proposals, decoding, PUBLISHED_COUNT)
    mark("NMS")
    answers = [in_seconds(rows, video.duration) for rows, (video, _) in zip(picks[:, :5], pairs)]
    mark("seconds")
    return answers, seconds


def agreement(
    model: str, found: Sequence[Sequence[Moment]], wanted: Sequence[Sequence[Moment]], visible_s: float = VISIBLE_S
) -> Agreement:
    """Return how far the best of the moments found is from the best of those wanted, query by query."""
    overlaps, shifts, different = [], [], 0
    for ours, theirs in zip(found, wanted):
        if not ours or not theirs:
            different += bool(ours) != bool(theirs)
            continue
        spans = np.array([[moments[0].start, moments[0].end] for moments in (ours, theirs)], np.float64)
        overlaps.append(float(temporal_iou(spans[:1], spans[1:])[0, 0]))
        shifts.append(float(np.abs(spans[0] - spans[1]).max()))
        different += shifts[-1] > visible_s
    mean = sum(overlaps) / len(overlaps) if overlaps else 1.0
    return Agreement(
        model, len(wanted), mean, min(overlaps, default=1.0), max(shifts, default=0.0), different, visible_s
    )


class _Once(logging.Filter):
    """Lets every message pass once: a sentence is asked hundreds of times, and so would its warning be said."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if message in self._seen:
            return False
        self._seen.add(message)
        return True


class _Run:
    """A run of the benchmark, and what it has found so far: an interruption loses nothing."""

    def __init__(
        self, paths: Sequence[Path], samples: int, batch: int, device: Device, threads: int | None, told: str
    ) -> None:
        self._paths, self._labels = paths, labels(paths)
        self._samples, self._batch, self._device, self._threads = samples, batch, device, threads
        self._command = told
        self._questions = Questions((), "Nothing was asked yet.", made_up=False)
        self._models: list[Model] = []
        self._subjects: list[Subject] = []
        self._agreements: list[Agreement] = []
        self._timings: list[Timing] = []
        self._phases: list[Phases] = []
        self._notes: list[str] = []
        self._conditions = [system_info.conditions("before")]

    def measure(self, data: Path | None, video: str | None, query: Sequence[str]) -> None:
        """Do everything."""
        once = _Once()
        log.addFilter(once)
        try:
            if data is not None:
                self._questions = data_questions(data, video, query)
            cold = [self._cold_start(path) for path in self._paths]
            grounders = [self._open(index, path, cold[index]) for index, path in enumerate(self._paths)]
            manifests = [grounder.manifest for grounder in grounders]
            _check_comparable(self._labels, manifests)
            if data is None:
                self._questions = made_up_questions(manifests, self._batch)
            if not query:
                self._questions = dataclasses.replace(self._questions, pairs=_askable(self._questions.pairs, grounders))
            pairs = self._questions.pairs
            self._models = [Model.of(*named, pairs) for named in zip(self._labels, grounders)]
            self._agree()
            for group in (self._one_query, self._batch_sizes, self._per_video, self._lengths, self._all_phases):
                group()
                self._conditions.append(system_info.conditions(f"after {group.__name__.strip('_').replace('_', ' ')}"))
        finally:
            log.removeFilter(once)

    def report(self, interrupted: bool) -> Report:
        """Return what was found so far."""
        first = self._conditions[0]
        last = system_info.conditions("after") if interrupted else self._conditions[-1]
        cores = cpu_info.cores()
        hardware = {"cpu": cpu_info.cpu_name(), "cores": cores, "gpu": None, "gpu_driver": None}
        if first.gpu:
            hardware.update(gpu=first.gpu.name, gpu_driver=first.gpu.driver)
        return Report(
            datetime.date.today().isoformat(),
            self._command,
            hardware,
            system_info.versions(),
            {"samples": self._samples, "batch": self._batch, "device": self._device, "threads": self._threads},
            self._questions.to_dict(),
            self._subjects,
            self._agreements,
            self._timings,
            self._phases,
            system_info.peak_rss_bytes(),
            [*self._conditions, last] if interrupted else self._conditions,
            self._all_notes(first, last, cores, interrupted),
            interrupted,
        )

    def _all_notes(
        self, first: system_info.Conditions, last: system_info.Conditions, cores: int, interrupted: bool
    ) -> list[str]:
        notes = ["The run was interrupted: what is missing was not measured."] if interrupted else []
        if self._samples < SAMPLES:
            notes.append(
                f"Only {self._samples} samples were asked for where {SAMPLES} are the rule: tails rest on few calls."
            )
        notes.append(
            f"Cases other than one query end after {SWEEP_SECONDS:g} s each; beside each stands how many calls it "
            "took, and percentiles that so few cannot carry are left out."
        )
        busy = system_info.others_load(first.load, last.load, cores, min(self._threads or cores, cores))
        slowed = system_info.throttling([*self._conditions, last])
        unsettled = sum(not timing.settled for timing in self._timings)
        if busy:
            notes.append(busy)
        if slowed:
            notes.append(f"The GPU's clock was held back by {', '.join(slowed)}.")
        if unsettled:
            notes.append(
                f"{unsettled} of {len(self._timings)} timings, marked *, never settled within {100 * TOLERANCE:g} % "
                "while warming up."
            )
        return notes + self._notes

    def _cold_start(self, path: Path) -> float | None:
        try:
            return cold_start(path, self._device, self._threads)
        except DeviceError as error:
            self._notes.append(str(error))
            return None

    def _open(self, index: int, path: Path, cold: float | None) -> Grounder:
        rss, graphics = system_info.rss_bytes(), system_info.gpu()
        began = time.perf_counter()
        grounder = Grounder.load(path, self._device, self._threads)
        # Times are of queries of one run of the network each.
        grounder.windows = None
        opened = time.perf_counter() - began
        pairs = self._questions.pairs or made_up_questions([grounder.manifest]).pairs
        began_asking = time.perf_counter()
        answer_one(grounder, pairs)
        answered = opened + time.perf_counter() - began_asking
        manifest, label = grounder.manifest, self._labels[index]
        files = files_of(path, manifest)
        report = getattr(grounder.backend, "memory_report", lambda: None)()
        now = system_info.rss_bytes()
        device = Model(label, grounder, (), ()).device
        grown = None
        if device == "cuda" and graphics and graphics.used_mib is not None:
            after = system_info.gpu()
            if after and after.used_mib is not None:
                grown = int((after.used_mib - graphics.used_mib) * 2**20)
        memory = Memory(
            sum(file.stat().st_size for file in files),
            now - rss if now is not None and rss is not None else None,
            getattr(report, "plan", None),
            getattr(report, "device", None),
            getattr(report, "pinned", None),
            grown,
        )
        kind: Literal["whole", "pair"] = "pair" if grounder.is_pair else "whole"
        hashes = {file.name: sha256(file) for file in files}
        self._subjects.append(
            Subject(label, hashes[path.name], hashes, manifest.precision, kind, device, opened, answered, cold, memory)
        )
        return grounder

    def _agree(self) -> None:
        if len(self._models) < 2:
            return
        answers = [
            model.grounder.ground_batch(model.pairs, batch_size=self._batch, presence=False) for model in self._models
        ]
        for model, found in zip(self._models[1:], answers[1:]):
            told = agreement(model.label, found, answers[0])
            self._agreements.append(told)
            log.info("%s", told.sentence(self._models[0].label))

    def _one_query(self) -> None:
        new, known = (Case(ONE_QUERY, f"{what} video", "end to end") for what in ("new", "known"))
        self._take(new, {model: _ground_one(model, model.fresh) for model in self._models})
        self._take(known, {model: _ground_one(model, model.again) for model in self._models})
        for boundary, told, models in self._boundaries():
            with told:
                self._take(Case(ONE_QUERY, "network", boundary), _networks(models, 1, boundary))
                self._take(
                    Case(ONE_QUERY, "encode a video", boundary),
                    {model: _encode(model, boundary) for model in models if model.grounder.is_pair},
                )

    def _batch_sizes(self) -> None:
        for size in sizes(self._batch):
            case = Case(BATCH_SIZE, "known videos", "end to end", size, size)
            self._take(case, {model: _ground_batch(model, size) for model in self._models}, SWEEP_SECONDS)
        for boundary, told, models in self._boundaries():
            with told:
                for size in sizes(self._batch):
                    case = Case(BATCH_SIZE, "network", boundary, size, size)
                    self._take(case, _networks(models, size, boundary), SWEEP_SECONDS)

    def _per_video(self) -> None:
        for size in sizes(self._batch):
            case = Case(PER_VIDEO, "known video", "end to end", size, size)
            self._take(
                case, {model: _ground_video(model, model.known[0][0], size) for model in self._models}, SWEEP_SECONDS
            )
        prepared = self._prepared()
        for size in sizes(self._batch):
            case = Case(PER_VIDEO, "prepared video", "end to end", size, size)
            calls = {model: _ground_video(model, video, size) for model, video in prepared.items()}
            self._take(case, calls, SWEEP_SECONDS)

    def _prepared(self) -> dict[Model, EncodedVideo]:
        """Return the first video, prepared by each model that has what it takes."""
        found = {}
        for model in self._models:
            if model.grounder.manifest.prepared_parts and hasattr(model.grounder.backend, "prepare"):
                try:
                    encoded = model.grounder.encode(model.known[0][0], prepare=True)
                    found[model] = cast(EncodedVideo, encoded)
                except GroundingError as error:
                    self._notes.append(f"{model.label}: no prepared video was asked: {error}")
        return found

    def _lengths(self) -> None:
        if not self._models:
            return
        longest = min(model.grounder.manifest.max_query_length for model in self._models)
        for length in sizes(longest):
            calls = {model: _ask_of_length(model, length) for model in self._models}
            self._take(Case(LENGTH, "network", "host", length), calls, SWEEP_SECONDS)

    def _all_phases(self) -> None:
        for size in dict.fromkeys((1, self._batch)):
            self._take_phases(size)

    def _boundaries(self) -> Iterator[tuple[Boundary, contextlib.AbstractContextManager[None], list[Model]]]:
        """Yield the boundaries around the network, what to enter for each, and the models that measure it."""
        yield "host", contextlib.nullcontext(), self._models
        telling = [model for model in self._models if model.tells_gpu]
        for model in self._models:
            if not model.tells_gpu:
                told = (
                    "it runs on the CPU" if model.device == "cpu" else "its library does not report the network's time"
                )
                note = f"{model.label}: no times of the GPU alone, since {told}."
                if note not in self._notes:
                    self._notes.append(note)
        if telling:
            yield "gpu", _gpu_timed(telling), telling

    def _take(self, case: Case, calls: Mapping[Model, Call], most_seconds: float | None = None) -> None:
        """Warm up and time a case with all models that have it, in turns."""
        ready = {model: call for model, call in calls.items() if self._works(case, model, call)}
        if not ready:
            return
        models = list(ready)
        samples: list[list[float]] = [[] for _ in models]
        told = f"{case.boundary}, {case.name} {case.size}"
        warm: list[WarmUp] = []
        try:
            warm = warm_up(list(ready.values()))
            self._take_turns(told, list(ready.values()), samples, most_seconds)
        except GroundingError as error:
            self._notes.append(f"{told} ended early: {error}")
        finally:
            for index, model in enumerate(models):
                if samples[index]:
                    against = index and models[0] is self._models[0] and samples[0]
                    ratio = speed_ratio(samples[index], samples[0]) if against else None
                    self._timings.append(Timing(case, model.label, Latency.of(samples[index]), warm[index], ratio))

    def _take_turns(
        self, told: str, calls: Sequence[Call], samples: Sequence[list[float]], most_seconds: float | None
    ) -> None:
        limit = None if most_seconds is None else most_seconds * len(calls)
        # Where no bar can be drawn, a line says how far it is.
        if not sys.stderr.isatty():
            log.info("Timing %s ...", told)
        with tqdm(total=self._samples, desc=told, unit="round", leave=False, disable=None) as bar:
            take_turns(calls, self._samples, samples, most_seconds=limit, fewest=FEWEST_CALLS, on_round=bar.update)

    def _works(self, case: Case, model: Model, call: Call) -> bool:
        """Call once, and keep what is said where it cannot be done: an engine may be built for less than is asked."""
        try:
            call.seconds(0)
        except GroundingError as error:
            self._timings.append(Timing(case, model.label, None, failed=str(error)))
            return False
        return True

    def _take_phases(self, size: int) -> None:
        told = f"phases of {size} queries"
        splits: dict[Model, list[dict[str, float]]] = {}
        calls = []
        for model in self._models:
            kept: list[dict[str, float]] = []
            call = _walk(model, size, kept)
            try:
                call.seconds(0)
            except GroundingError as error:
                self._notes.append(f"{model.label}: {told} were not measured: {error}")
            else:
                splits[model] = kept
                calls.append(call)
        if not calls:
            return
        try:
            try:
                warm_up(calls)
            finally:
                for kept in splits.values():
                    kept.clear()
            self._take_turns(told, calls, [[] for _ in calls], SWEEP_SECONDS)
        except GroundingError as error:
            self._notes.append(f"{told} ended early: {error}")
        finally:
            for model, kept in splits.items():
                if kept:
                    ms = {name: 1e3 * float(np.median([split[name] for split in kept])) for name in kept[0]}
                    videos = len({id(video) for video, _ in model.fresh(0, size)})
                    self._phases.append(Phases(model.label, size, videos, len(kept), ms))


def _ground_one(model: Model, chosen: Callable[[int, int], Sequence[Pair]]) -> Call:
    return Call(lambda pair: model.grounder.ground(*pair), lambda number: chosen(number, 1)[0])


def _ground_batch(model: Model, size: int) -> Call:
    return Call(
        lambda pairs: model.grounder.ground_batch(pairs, batch_size=size), lambda number: model.again(number, size)
    )


def _ground_video(model: Model, video: Video | EncodedVideo, size: int) -> Call:
    def prepare(number: int) -> list[Pair]:
        return [(video, query) for _, query in model.again(number, size)]

    return Call(lambda pairs: model.grounder.ground_batch(pairs, batch_size=size), prepare)


def _networks(models: Sequence[Model], size: int, boundary: Boundary) -> dict[Model, Call]:
    return {model: _network(model, size, boundary) for model in models}


def _network(model: Model, size: int, boundary: Boundary) -> Call:
    # A few batches take turns; all of them would fill the memory.
    count = max(1, min(4, len(model.pairs) // size))
    ready = [model.network(model.again(number, size)) for number in range(count)]
    return Call(lambda run: run(None), lambda number: ready[number % count], _told(model, boundary))


def _encode(model: Model, boundary: Boundary) -> Call:
    pair = cast(PairBackend, model.grounder.backend)
    videos = list({id(video): video for video, _ in model.pairs}.values())
    features = [model.grounder.segments(video).features[None].astype(np.float32, copy=False) for video in videos]
    return Call(pair.encode, lambda number: features[number % len(features)], _told(model, boundary))


def _ask_of_length(model: Model, length: int) -> Call:
    ids = np.random.default_rng(length).integers(1, len(model.grounder.manifest.vocabulary) + 1, length, np.int32)
    return Call(model.asked([ids], [model.known[0][0]]))


def _walk(model: Model, size: int, kept: list[dict[str, float]]) -> Call:
    return Call(lambda pairs: kept.append(walk(model.grounder, pairs)[1]), lambda number: model.fresh(number, size))


def _told(model: Model, boundary: Boundary) -> Callable[[], float] | None:
    backend: Any = model.grounder.backend
    return (lambda: backend.gpu_ms / 1e3) if boundary == "gpu" else None


@contextlib.contextmanager
def _gpu_timed(models: Sequence[Model]) -> Iterator[None]:
    backends: list[Any] = [model.grounder.backend for model in models]
    for backend in backends:
        backend.time_gpu(True)
    try:
        yield
    finally:
        for backend in backends:
            backend.time_gpu(False)


def _check_comparable(names: Sequence[str], manifests: Sequence[Manifest]) -> None:
    first = manifests[0].features
    for name, manifest in zip(names, manifests):
        if manifest.features.dim != first.dim:
            raise ModelFileError(
                f"{names[0]} takes features of width {first.dim} and {name} of width {manifest.features.dim}, so they "
                "cannot be asked the same; compare models of one kind of features."
            )


def answer_one(grounder: Grounder, pairs: Sequence[tuple[Video, str]] = ()) -> None:
    """Answer the first of these pairs, or a made-up one."""
    grounder.ground(*(pairs or made_up_questions([grounder.manifest]).pairs)[0])


def cold_start(path: Path, device: Device, threads: int | None) -> float:
    """Return the seconds from the start of a fresh process to its first answer.

    Raises:
        DeviceError: the process failed.
    """
    code = (
        "import sys; from runtime.benchmark import answer_one; from runtime.grounding.grounder import Grounder; "
        f"answer_one(Grounder.load({str(path.resolve())!r}, {device!r}, {threads!r})); print('answered', flush=True)"
    )
    root = Path(__file__).resolve().parents[1]
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=root
    ) as process:
        assert process.stdout is not None
        try:
            answered = any(line.startswith("answered") for line in process.stdout)
            seconds = time.perf_counter() - began
        except BaseException:
            process.kill()
            raise
    if not answered:
        raise DeviceError(f"The cold start of {path.name} was not measured, since a fresh process could not answer.")
    return seconds


if __name__ == "__main__":
    command(benchmark)
