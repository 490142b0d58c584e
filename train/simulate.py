"""A data set whose clip features are simulated: made-up videos, or real annotations.

A clip's features are a random but fixed function of what is said to happen in it: a latent vector (scene,
objects, the video itself, the actions under way, noise) is projected at random, cut at each channel's 80 %
quantile, raised to the power 1.3 and scaled per channel. The result looks like C3D fc6: about 80 % zeros, heavy tails.
On Charades-STA the sentences never touch it; on ActivityNet Captions and TACoS, which nobody labelled, see
`train.simulation.from_captions`. Recall on such features says whether training and deployment work; it cannot be
compared with published numbers.
"""

from __future__ import annotations

import csv
import errno
import functools
import hashlib
import io
import json
import logging
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from runtime.core.cli import command, next_command
from runtime.core.errors import AnnotationError, FeatureError, OutputError, excerpt
from runtime.core.io.files import (
    check_directory,
    content_names,
    locked,
    read_json,
    remove_strays,
    replace_when_whole,
    sha256,
    write_json,
    write_text,
)
from runtime.core.io.text_files import read_lines, read_text
from runtime.datasets.dataset import FEATURE_DIRECTORY
from train.simulation.from_captions import captions_plan
from train.simulation.scenario import CLOCK, REFERENCE_VIDEOS, Plan, Story, seeded_order

log = logging.getLogger("drn.simulate")

DONE, UNDER_WAY = "simulated.json", ".simulating.json"
SPLITS = ("train", "test")
TABLES = {
    "Charades_word2id.json": "the word table",
    "Charades_fps_dict.json": "frames per second",
    "Charades_duration.json": "durations",
    "Charades_frames_info.json": "frame counts",
}
# Raised whenever the same parameters come to mean other features, so that a resumed run never mixes two kinds.
RECIPE = 1

LATENT_DIM = 128
ZERO_FRACTION, POWER, GAIN_SPREAD = 0.8, 1.3, 0.5
NOISE_SECONDS = 1.0  # the time after which the noise has forgotten 63 % of itself


@dataclass(frozen=True)
class Difficulty:
    """How much hides the actions. An action adds a vector of length 1 to the latent of a clip.

    `identity` and `noise` are standard deviations per latent dimension: what one video adds to all its clips, and what
    varies in time. `jitter` is that of an action's start and of its end, in seconds. `drop` and `confuse` are the
    shares of actions that leave no trace, or that of a sibling: an action with the same object or verb.
    """

    identity: float
    noise: float
    jitter: float
    drop: float
    confuse: float


# Chosen on Charades-STA so that the action of a moment can be found in unseen videos' features well, moderately and
# barely better than by the best constant moment.
DIFFICULTIES = {
    "easy": Difficulty(identity=0.10, noise=0.15, jitter=0.5, drop=0.03, confuse=0.03),
    "medium": Difficulty(identity=0.20, noise=0.30, jitter=0.9, drop=0.10, confuse=0.10),
    "hard": Difficulty(identity=0.25, noise=0.37, jitter=1.2, drop=0.15, confuse=0.15),
}


def simulate(
    output: Path,
    *,
    annotations: Path | None = None,
    feature_dim: int = 4096,
    videos: int | None = None,
    difficulty: Literal["easy", "medium", "hard"] = "medium",
    seed: int = 0,
    dtype: Literal["float16", "float32"] = "float16",
    file_format: Literal["npy", "pt"] = "npy",
) -> Path:
    """Write a data set in its published layout, made-up ones in that of Charades-STA, with simulated clip features.

    Without --annotations the videos, sentences and moments are made up too; with it the annotation files are
    copied. On Charades-STA the features follow the human action labels in Charades_v1_train.csv and
    Charades_v1_test.csv; ActivityNet Captions and TACoS have none, and the features follow the content words of the
    sentences themselves, so that recall on them says that the machinery works, and no more.
    The same arguments give the same files, and a video's features do not depend on which others are written. An
    interrupted run is continued by the same command. Recall on simulated features is not comparable with
    published numbers.

    Args:
        output: the directory to make; new, empty, or left by the same command.
        annotations: a directory with the Charades-STA text files, JSON tables and both Charades_v1 csv files; or with
            the train.json, val.json and test.json of ActivityNet Captions or TACoS.
        feature_dim: D, channels per clip (published: 4096 for Charades-STA and TACoS, 500 for ActivityNet).
        videos: without --annotations how many to make up (default 300, one in five for testing); with it, at most
            so many of each split (a seeded choice).
        difficulty: how well the actions are hidden.
        seed: of everything that is random.
        dtype: of the stored features.
        file_format: npy is read faster and without torch; pt is what the published features are.

    Returns:
        The directory written.

    Raises:
        AnnotationError: annotation files are missing, malformed or contradict each other.
        FeatureError: the size asked for makes no sense.
        OutputError: the directory holds something else, or cannot be written.
    """
    if feature_dim < 1:
        raise FeatureError(
            f"--feature-dim is {feature_dim} and should be at least 1 (C3D has 4096).", code="invalid_option"
        )
    least = 1 if annotations else 2
    if videos is not None and videos < least:
        raise FeatureError(f"--videos is {videos} and should be at least {least}.", code="invalid_option")
    if seed < 0:
        raise FeatureError(f"--seed is {seed} and should be 0 or more.", code="invalid_option")
    if difficulty not in DIFFICULTIES:
        raise FeatureError(
            f"--difficulty is {excerpt(difficulty)} and should be one of {', '.join(DIFFICULTIES)}.",
            code="invalid_option",
        )
    if dtype not in ("float16", "float32") or file_format not in ("npy", "pt"):
        raise FeatureError(
            f"Features are stored as float16 or float32, in npy or pt, not {dtype} in {file_format}.",
            code="invalid_option",
        )
    if annotations is not None:
        check_directory(annotations, "The directory of annotations", AnnotationError)
    if annotations is None:
        plan = made_up_plan(videos or 300, seed)
    elif any((Path(annotations) / f"{split}.json").exists() for split in ("train", "val", "test")):
        plan = captions_plan(Path(annotations), videos, seed)
    else:
        plan = real_plan(Path(annotations), videos, seed)
    sources = list(plan.texts) if plan.directory != FEATURE_DIRECTORY else _source_names()
    wanted = {
        "recipe": RECIPE,
        "seed": seed,
        "difficulty": difficulty,
        "feature_dim": feature_dim,
        "videos": videos if annotations or videos else 300,
        "dtype": dtype,
        "file_format": file_format,
        "annotations": {name: sha256(Path(annotations) / name) for name in sources} if annotations else None,
    }
    output = Path(output)
    _check_ours(output, wanted)
    with locked(output):
        _check_ours(output, wanted, quiet=False)
        folder = output / plan.directory
        hidden = [story for story in plan.stories if not _feature_path(folder, story.name, file_format).exists()]
        _check_space(output, hidden, feature_dim * np.dtype(dtype).itemsize)
        _begin(output, folder, wanted, plan.statement)
        if hidden:
            _write_features(
                folder, hidden, Simulator(plan, DIFFICULTIES[difficulty], feature_dim, seed), dtype, file_format
            )
        # The annotations come after the features and the statement last, so that a run cut short never looks whole.
        for name, text in plan.texts.items():
            write_text(output / name, text)
        facts = {
            **plan.facts,
            "videos": len(plan.stories),
            "clips": sum(story.num_clips for story in plan.stories),
        }
        constants = {
            "window": CLOCK.window,
            "stride": CLOCK.stride,
            "latent_dim": latent_dim(feature_dim),
            "zero_fraction": ZERO_FRACTION,
            "power": POWER,
            "gain_spread": GAIN_SPREAD,
            "noise_seconds": NOISE_SECONDS,
            **asdict(DIFFICULTIES[difficulty]),
        }
        write_json(
            output / DONE, {"statement": plan.statement, "parameters": wanted, "model": constants, "contents": facts}
        )
        (output / UNDER_WAY).unlink(missing_ok=True)
    print(f"{output}: {facts['videos']} videos, {facts['clips']} clips of {feature_dim} channels ({difficulty}).")
    for split, count in facts["moments"].items():
        print(f"{split}: {count} moments")
    print(plan.statement)
    next_command("train", "--data", output, "--output", "runs/simulated")
    return output


def latent_dim(feature_dim: int) -> int:
    """Return the width of the latent vector: few channels cannot represent many dimensions."""
    return min(LATENT_DIM, max(8, feature_dim // 2))


def generator(*key: object) -> np.random.Generator:
    """Return the random numbers that belong to `key`, the same on every machine and in any order of asking."""
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


class Simulator:
    """The fixed function from a story to features: embeddings, projection, thresholds and gains of one seed."""

    def __init__(self, plan: Plan, difficulty: Difficulty, feature_dim: int, seed: int) -> None:
        self.difficulty, self.seed, self.width = difficulty, seed, latent_dim(feature_dim)
        self.parts, self.siblings = plan.parts, plan.siblings
        self.embedding = functools.cache(self._embedding)
        rng = generator(seed, "channels", feature_dim)
        projection = rng.standard_normal((self.width, feature_dim), dtype=np.float32)
        gains = np.exp(GAIN_SPREAD * rng.standard_normal(feature_dim, dtype=np.float32))
        latents = np.concatenate([self.latents(story)[:: 1 + story.num_clips // 32] for story in plan.reference])
        thresholds, spreads = _channel_statistics(latents, projection)
        # gain * max((u - threshold) / spread, 0) ** POWER, with all that is constant folded into the projection;
        # 2 brings the active channels to about 1, as in C3D.
        scales = (2 * gains) ** (1 / POWER) / spreads
        self.projection, self.thresholds = projection * scales, thresholds * scales

    def features(self, story: Story) -> np.ndarray:
        """Return the story's clip features, (num_clips, feature_dim) float32, all at least 0."""
        features = self.latents(story) @ self.projection
        features -= self.thresholds
        np.maximum(features, 0, out=features)
        # x ** POWER, several times faster than np.power; log(0) = -inf comes back as exactly 0.
        with np.errstate(divide="ignore"):
            np.log(features, out=features)
        features *= np.float32(POWER)
        return np.exp(features, out=features)

    def latents(self, story: Story) -> np.ndarray:
        """Return what hides behind the story's clips, (num_clips, K) float32."""
        rng = generator(self.seed, "video", story.name)
        clip_seconds = CLOCK.stride * story.duration / story.num_frames
        constant = self.embedding("scene", story.scene).copy()
        for thing in story.objects:
            constant += self.embedding("object", thing) / np.float32(len(story.objects) ** 0.5)
        constant += self.difficulty.identity * rng.standard_normal(self.width, dtype=np.float32)
        latents = self._noise(rng, story.num_clips, clip_seconds)
        latents += constant
        if story.actions:
            starts = np.arange(story.num_clips) * clip_seconds
            traces, weights = zip(
                *(self._trace(rng, action, starts, clip_seconds) for action in story.actions), strict=True
            )
            latents += np.stack(weights, axis=1).astype(np.float32) @ np.stack(traces)
        return latents

    def _trace(
        self,
        rng: np.random.Generator,
        action: tuple[str, float, float],
        clip_starts: np.ndarray,
        clip_seconds: float,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the vector an action leaves (K,), and how much of it is in each clip (num_clips,), 0 to 1."""
        name, start, end = action
        chance, choice, jitter = rng.random(), rng.random(), rng.standard_normal(2) * self.difficulty.jitter
        start, end = start + jitter[0], max(end + jitter[1], start + jitter[0])
        window_seconds = CLOCK.window / CLOCK.stride * clip_seconds
        shared = np.minimum(clip_starts + window_seconds, end) - np.maximum(clip_starts, start)
        weights = np.clip(shared / window_seconds, 0, 1)
        if chance < self.difficulty.drop:
            weights = np.zeros_like(weights)
        elif chance < self.difficulty.drop + self.difficulty.confuse:
            siblings = self.siblings(name)
            name = siblings[int(choice * len(siblings))] if siblings else name
        return self.embedding("action", name), weights

    def _noise(self, rng: np.random.Generator, num_clips: int, clip_seconds: float) -> np.ndarray:
        """Return AR(1) noise, (num_clips, K), stationary from the first clip on."""
        white = rng.standard_normal((num_clips, self.width), dtype=np.float32) * np.float32(self.difficulty.noise)
        kept = np.float32(np.exp(-clip_seconds / NOISE_SECONDS))
        fresh = np.sqrt(1 - kept**2)
        for now in range(1, num_clips):
            white[now] = kept * white[now - 1] + fresh * white[now]
        return white

    def _embedding(self, kind: str, name: str) -> np.ndarray:
        """Return the vector of a scene, an object or an action, (K,), of length about 1."""
        parts = self.parts(name) if kind == "action" else [(f"{kind} {name}", 1.0)]
        vectors = [
            np.float32(share**0.5)
            * generator(self.seed, "embedding", part).standard_normal(self.width, dtype=np.float32)
            for part, share in parts
        ]
        return np.stack(vectors).sum(axis=0) / np.float32(self.width**0.5)


def _channel_statistics(latents: np.ndarray, projection: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return every channel's ZERO_FRACTION quantile and standard deviation over `latents`; 256 channels at a time."""
    thresholds, spreads = [], []
    rank = int(ZERO_FRACTION * len(latents))
    for first in range(0, projection.shape[1], 256):
        channels = np.ascontiguousarray((latents @ projection[:, first : first + 256]).T)
        spreads.append(channels.std(axis=1))
        channels.partition(rank, axis=1)
        thresholds.append(channels[:, rank])
    return np.concatenate(thresholds), np.concatenate(spreads) + np.float32(1e-6)


def real_plan(annotations: Path, videos: int | None, seed: int) -> Plan:
    """Read the annotation directory into a plan; see `simulate`.

    Raises:
        AnnotationError: a file is missing or malformed (the row is named), or lacks a video.
    """
    for name in _source_names():
        if not (annotations / name).is_file():
            raise AnnotationError(
                f"{annotations} lacks {name}; --annotations takes train.json of ActivityNet Captions or TACoS and its "
                f"other splits, or of Charades-STA {', '.join(_source_names())}, in one directory.",
                code="missing_file",
            )
    durations = read_json(annotations / "Charades_duration.json", "durations")
    frames = read_json(annotations / "Charades_frames_info.json", "frame counts")
    labels = {split: _read_labels(annotations / f"Charades_v1_{split}.csv") for split in SPLITS}
    everything = {**labels["train"], **labels["test"]}
    classes = sorted({action for _, _, actions in everything.values() for action, _, _ in actions})
    texts: dict[str, str] = {name: read_text(annotations / name, "a table") for name in TABLES}
    chosen: dict[str, None] = {}
    everyone: dict[str, None] = {}
    moments, exact = {}, {}
    for split in SPLITS:
        path = annotations / f"Charades_sta_{split}.txt"
        lines = _read_moments(path)
        names = list(dict.fromkeys(video for _, video, _, _ in lines))
        everyone.update(dict.fromkeys(names))
        keep = set(seeded_order(names, seed)[:videos])
        kept = [line for line in lines if line[1] in keep]
        texts[path.name] = (
            read_text(path, "annotations") if videos is None else "".join(text + "\n" for text, *_ in kept)
        )
        chosen.update(dict.fromkeys(name for name in names if name in keep))
        moments[split] = len(kept)
        exact[split] = sum(_is_action(video, start, end, everything) for _, video, start, end in kept)

    stories = {}
    for name in everyone:
        if name not in everything:
            raise AnnotationError(
                f"Video {name} is annotated but has no row in the Charades_v1 csv files; add its row.",
                code="unlisted_video",
            )
        scene, objects, actions = everything[name]
        try:
            num_frames, duration = int(frames[name]), float(durations[name])
        except (KeyError, TypeError, ValueError, OverflowError):
            raise AnnotationError(
                f"Video {name} is annotated but has no number in Charades_frames_info.json or Charades_duration.json.",
                code="unlisted_video",
            ) from None
        if num_frames < 1 or not 0 < duration < float("inf"):
            raise AnnotationError(
                f"Video {name} has {num_frames} frames in {duration} s; both should be above 0.",
                code="invalid_frame_count",
            )
        stories[name] = Story(name, num_frames, duration, scene, objects, actions)
    return Plan(
        stories=[stories[name] for name in chosen],
        reference=[stories[name] for name in seeded_order(everyone, seed)[:REFERENCE_VIDEOS]],
        texts=texts,
        parts=_class_parts,
        siblings=functools.partial(_class_siblings, classes),
        facts={"kind": "real annotations", "moments": moments, "moments_equal_to_an_action": exact},
    )


def _source_names() -> list[str]:
    return [f"Charades_sta_{s}.txt" for s in SPLITS] + list(TABLES) + [f"Charades_v1_{s}.csv" for s in SPLITS]


def _read_moments(path: Path) -> list[tuple[str, str, float, float]]:
    """Return (line, video, start, end) of every line of an annotation file; checks its form and not its times."""
    found = []
    for number, line in enumerate(read_lines(path, "lines of VIDEO START END##SENTENCE"), start=1):
        head, mark, _ = line.partition("##")
        try:
            video, start, end = head.split()
            found.append((line, video, float(start), float(end)))
            # The name becomes that of a file.
            mark = mark if re.fullmatch(r"[\w-]+", video) else ""
        except ValueError:
            mark = ""
        if not mark:
            raise AnnotationError(
                f'{path}, line {number}: expected "VIDEO START END##sentence.", found {line[:80]!r}.',
                code="malformed_row",
            )
    if not found:
        raise AnnotationError(f"{path} has no annotations.", code="empty_file")
    return found


def _read_labels(path: Path) -> dict[str, tuple[str, tuple[str, ...], tuple[tuple[str, float, float], ...]]]:
    """Return video -> (scene, objects, actions in seconds) of a Charades_v1 csv file.

    Intervals that end before they start (the real files hold a few) say nothing and are left out.
    """
    reader = csv.DictReader(io.StringIO(read_text(path, "a table of labels"), newline=""), strict=True)
    labels = {}
    try:
        missing = {"id", "scene", "objects", "actions"} - set(reader.fieldnames or ())
        if missing:
            raise AnnotationError(
                f"{path}, line 1: the columns lack {', '.join(sorted(missing))}.", code="missing_columns"
            )
        for row in reader:
            labels[row["id"]] = _label(row, len(reader.fieldnames or ()), f"{path}, line {reader.line_num}")
    except csv.Error as error:
        raise AnnotationError(f"{path}, line {reader.line_num}: not csv ({error}).", code="malformed_row") from None
    return labels


def _label(
    row: dict[str, str | None], num_columns: int, where: str
) -> tuple[str, tuple[str, ...], tuple[tuple[str, float, float], ...]]:
    """Return (scene, objects, actions) of one csv row; `where` names it when it is malformed."""
    if not row["id"] or row["actions"] is None or None in row.values():
        raise AnnotationError(f"{where}: expected {num_columns} columns, found fewer.", code="malformed_row")
    actions = []
    for entry in filter(None, row["actions"].split(";")):
        try:
            name, start, end = entry.split()
            _class_number(name)
            action = (name, float(start), float(end))
        except ValueError:
            raise AnnotationError(
                f'{where}: actions should read "c077 12.10 18.00;...", found {entry[:60]!r}.',
                code="malformed_row",
            ) from None
        if action[1] < action[2]:
            actions.append(action)
    objects = tuple(sorted(set(filter(None, (row["objects"] or "").split(";")))))
    return row["scene"] or "", objects, tuple(actions)


def _class_number(name: str) -> int:
    if not name.startswith("c"):
        raise ValueError(name)
    return int(name[1:])


def _class_parts(name: str) -> list[tuple[str, float]]:
    """Return what an action class is made of: itself, and what it shares with its neighbours in the numbering."""
    number = _class_number(name)
    shared = [(f"class family {neighbour}", 0.4 / 3) for neighbour in (number - 1, number, number + 1)]
    return [(f"class {number}", 0.6), *shared]


def _class_siblings(classes: Sequence[str], name: str) -> list[str]:
    """Return the classes numbered next to `name`: Charades numbers what is done with one object in a row."""
    number = _class_number(name)
    return [other for other in classes if 0 < abs(_class_number(other) - number) <= 2]


def _is_action(video: str, start: float, end: float, labels: dict[str, Any]) -> bool:
    actions = labels.get(video, ("", (), ()))[2]
    return any(abs(start - first) < 0.051 and abs(end - last) < 0.051 for _, first, last in actions)


VERBS = {
    "open": ("opens", "opening"),
    "close": ("closes", "closing"),
    "wash": ("washes", "washing"),
    "hold": ("holds", "holding"),
    "throw": ("throws", "throwing"),
    "take": ("takes", "taking"),
}
DEEDS = {
    "door": ("open", "close", "wash"),
    "window": ("open", "close", "wash"),
    "book": ("open", "hold", "throw", "take"),
    "box": ("open", "close", "throw", "take"),
    "cup": ("wash", "hold", "take"),
    "pillow": ("hold", "throw", "take"),
    "towel": ("wash", "throw", "take"),
    "laptop": ("open", "close", "hold"),
}
PLACES = ("kitchen", "bedroom", "hallway", "bathroom", "garage", "basement")
TEMPLATES = (
    "person {does} the {thing}.",
    "a person is {doing} the {thing}.",
    "the person {does} a {thing}.",
    "person starts {doing} the {thing}.",
    "a person is {doing} a {thing} in the {place}.",
)
FRAME_RATES = ("30", "29.97", "25", "24")


def made_up_plan(videos: int, seed: int) -> Plan:
    """Make up `videos` videos, the second of every five for testing; see `simulate`."""
    stories, lines = [], {split: list[str]() for split in SPLITS}
    rates: dict[str, str] = {}
    for index in range(max(videos, REFERENCE_VIDEOS)):
        story, rate, sentences = _make_up(index, seed)
        stories.append(story)
        if index < videos:
            rates[story.name] = rate
            lines["test" if index % 5 == 1 else "train"] += sentences
    words: dict[str, int] = {}
    for sentence in (line.split("##")[1] for split in SPLITS for line in lines[split]):
        for word in sentence.replace(".", "").split():
            words.setdefault(word, len(words) + 1)
    kept = stories[:videos]
    tables: dict[str, Any] = {
        "Charades_word2id.json": words,
        "Charades_fps_dict.json": rates,
        "Charades_duration.json": {story.name: story.duration for story in kept},
        "Charades_frames_info.json": {story.name: story.num_frames for story in kept},
    }
    texts = {name: json.dumps(table, indent=2) + "\n" for name, table in tables.items()}
    texts |= {f"Charades_sta_{split}.txt": "".join(line + "\n" for line in lines[split]) for split in SPLITS}
    moments = {split: len(lines[split]) for split in SPLITS}
    return Plan(
        stories=kept,
        reference=stories[:REFERENCE_VIDEOS],
        texts=texts,
        parts=_deed_parts,
        siblings=_deed_siblings,
        facts={"kind": "made up", "moments": moments, "moments_equal_to_an_action": moments},
    )


def _make_up(index: int, seed: int) -> tuple[Story, str, list[str]]:
    """Return video number `index`: its story, frame rate and annotation lines."""
    rng = generator(seed, "story", index)
    name = f"SIM{index:05d}"
    rate = FRAME_RATES[int(rng.integers(len(FRAME_RATES)))]
    num_frames = round(float(rng.uniform(10, 40)) * float(rate))
    duration = round(num_frames / float(rate), 2)
    place = PLACES[int(rng.integers(len(PLACES)))]
    deeds = [f"{verb} {thing}" for thing, verbs in DEEDS.items() for verb in verbs]
    actions, sentences = [], []
    # Each deed at most once in a video, so that a sentence has one answer.
    for deed in rng.permutation(deeds)[: int(rng.integers(2, 5))].tolist():
        verb, thing = deed.split()
        length = max(float(rng.uniform(0.12, 0.45)) * duration, 2.0)
        start = round(float(rng.uniform(0, duration - length)), 1)
        end = round(min(start + length, duration), 1)
        actions.append((deed, start, end))
        does, doing = VERBS[verb]
        for template in rng.permutation(len(TEMPLATES))[: int(rng.integers(1, 3))].tolist():
            sentence = TEMPLATES[template].format(does=does, doing=doing, thing=thing, place=place)
            sentences.append(f"{name} {start} {end}##{sentence}")
    objects = tuple(sorted({deed.split()[1] for deed, _, _ in actions}))
    return Story(name, num_frames, duration, place, objects, tuple(actions)), rate, sentences


def _deed_parts(name: str) -> list[tuple[str, float]]:
    """Return what a made-up action is made of: itself, its verb and its object."""
    verb, thing = name.split()
    return [(f"deed {name}", 0.5), (f"verb {verb}", 0.25), (f"thing {thing}", 0.25)]


def _deed_siblings(name: str) -> list[str]:
    """Return the made-up actions with the same verb, or the same object."""
    verb, thing = name.split()
    deeds = [(other, at) for at, verbs in DEEDS.items() for other in verbs]
    return [f"{other} {at}" for other, at in deeds if (other == verb) != (at == thing)]


def _check_ours(output: Path, wanted: dict[str, Any], quiet: bool = True) -> None:
    """Raise OutputError unless `output` is new, empty, or left by the same command; changes nothing."""
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file and --output names a directory; choose another.", code="output_is_file")
    try:
        names = content_names(output)
    except OSError as error:
        raise OutputError(
            f"{output} cannot be read: {error.strerror}. Choose another place.", code="unreadable_file"
        ) from error
    if not names:
        return
    marker = next((name for name in (DONE, UNDER_WAY) if name in names), None)
    if marker is None:
        raise OutputError(
            f"{output} is not empty ({names[0]}) and was not made by train.simulate; choose a new directory.",
            code="output_not_empty",
        )
    record = read_json(output / marker, "what was simulated here", OutputError)
    held = record.get("parameters") if isinstance(record, dict) else None
    if held != wanted:
        differing = [key for key in wanted if not isinstance(held, dict) or held.get(key) != wanted[key]]
        raise OutputError(
            f"{output} holds another simulation (different: {', '.join(differing) or 'parameters'}); "
            f"choose a new directory, or delete that one.",
            code="settings_mismatch",
        )
    if not quiet:
        log.info("%s was begun by the same command: the features that are there are kept.", output)


def _begin(output: Path, folder: Path, wanted: dict[str, Any], statement: str) -> None:
    """Mark `output` as a simulation that is not yet whole; features go to `folder`."""
    write_json(output / UNDER_WAY, {"statement": statement, "parameters": wanted})
    try:
        (output / DONE).unlink(missing_ok=True)
        folder.mkdir(exist_ok=True)
        remove_strays(folder)
    except OSError as error:
        raise OutputError(f"{output} cannot be written: {error.strerror}. Choose another place.") from error


def _feature_path(folder: Path, video: str, file_format: str) -> Path:
    return folder / f"{video}.{file_format}"


def _check_space(output: Path, stories: Sequence[Story], bytes_per_clip: int) -> None:
    needed = sum(story.num_clips for story in stories) * bytes_per_clip
    there = next(place for place in (output, *output.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise OutputError(
            f"The features need {needed / 1e6:,.0f} MB and the disk of {output} has {free / 1e6:,.0f} MB left; "
            f"free some, or ask for fewer --videos or a smaller --feature-dim.",
            code="disk_full",
        )


def _write_features(folder: Path, stories: Sequence[Story], simulator: Simulator, dtype: str, file_format: str) -> None:
    from tqdm import tqdm

    write = _write_npy if file_format == "npy" else _write_pt
    for story in tqdm(stories, desc="features", unit="video", disable=None, leave=False):
        features = simulator.features(story).astype(dtype)
        with (
            replace_when_whole(_feature_path(folder, story.name, file_format)) as path,
            path.open("wb") as stream,
        ):
            write(stream, features)


def _write_npy(stream: BinaryIO, features: np.ndarray) -> None:
    # np.save would hide a full disk: its own writer raises an OSError without the error number.
    np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(features))
    stream.write(features.data)


def _write_pt(stream: BinaryIO, features: np.ndarray) -> None:
    import torch

    try:
        torch.save(torch.from_numpy(features), stream)
    except RuntimeError as error:
        full = shutil.disk_usage(Path(stream.name).parent).free < features.nbytes
        raise OSError(errno.ENOSPC if full else errno.EIO, "torch could not write it") from error


if __name__ == "__main__":
    command(simulate)
