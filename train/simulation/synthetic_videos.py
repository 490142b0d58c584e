"""Generate synthetic videos, sentences and moments in the layout of Charades-STA."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from train.simulation.charades_actions import SPLITS
from train.simulation.scenario import REFERENCE_VIDEOS, Scenario, SimulationPlan, seeded_generator

VERBS = {
    "open": ("opens", "opening"),
    "close": ("closes", "closing"),
    "wash": ("washes", "washing"),
    "hold": ("holds", "holding"),
    "throw": ("throws", "throwing"),
    "take": ("takes", "taking"),
}
ACTIONS = {
    "door": ("open", "close", "wash"),
    "window": ("open", "close", "wash"),
    "book": ("open", "hold", "throw", "take"),
    "box": ("open", "close", "throw", "take"),
    "cup": ("wash", "hold", "take"),
    "pillow": ("hold", "throw", "take"),
    "towel": ("wash", "throw", "take"),
    "laptop": ("open", "close", "hold"),
}
SCENES = ("kitchen", "bedroom", "hallway", "bathroom", "garage", "basement")
TEMPLATES = (
    "person {does} the {item}.",
    "a person is {doing} the {item}.",
    "the person {does} a {item}.",
    "person starts {doing} the {item}.",
    "a person is {doing} a {item} in the {scene}.",
)
FRAME_RATES = ("30", "29.97", "25", "24")


def synthetic_plan(videos: int, seed: int) -> SimulationPlan:
    """Return a plan of synthetic videos, of which the second of every five is for testing; see `train.simulate`."""
    scenarios, lines = [], {split: list[str]() for split in SPLITS}
    rates: dict[str, str] = {}
    for index in range(max(videos, REFERENCE_VIDEOS)):
        scenario, rate, sentences = _synthesize(index, seed)
        scenarios.append(scenario)
        if index < videos:
            rates[scenario.name] = rate
            lines["test" if index % 5 == 1 else "train"] += sentences
    selected = scenarios[:videos]
    tables: dict[str, Any] = {
        "Charades_word2id.json": _word_ids(line.split("##")[1] for split in SPLITS for line in lines[split]),
        "Charades_fps_dict.json": rates,
        "Charades_duration.json": {scenario.name: scenario.duration for scenario in selected},
        "Charades_frames_info.json": {scenario.name: scenario.num_frames for scenario in selected},
    }
    texts = {name: json.dumps(table, indent=2) + "\n" for name, table in tables.items()}
    texts |= {f"Charades_sta_{split}.txt": "".join(line + "\n" for line in lines[split]) for split in SPLITS}
    moments = {split: len(lines[split]) for split in SPLITS}
    return SimulationPlan(
        scenarios=selected,
        reference=scenarios[:REFERENCE_VIDEOS],
        texts=texts,
        sources=(),
        action_parts=_action_parts,
        confusable_actions=_confusable_actions,
        contents={"kind": "made up", "moments": moments, "moments_equal_to_an_action": moments},
    )


def _word_ids(sentences: Iterable[str]) -> dict[str, int]:
    """Number the words from 1 in the order of their first appearance."""
    words: dict[str, int] = {}
    for sentence in sentences:
        for word in sentence.replace(".", "").split():
            words.setdefault(word, len(words) + 1)
    return words


def _synthesize(index: int, seed: int) -> tuple[Scenario, str, list[str]]:
    """Return the scenario, frame rate and annotation lines of video number `index`."""
    rng = seeded_generator(seed, "story", index)
    name = f"SIM{index:05d}"
    rate = FRAME_RATES[int(rng.integers(len(FRAME_RATES)))]
    num_frames = round(float(rng.uniform(10, 40)) * float(rate))
    duration = round(num_frames / float(rate), 2)
    scene = SCENES[int(rng.integers(len(SCENES)))]
    all_actions = [f"{verb} {item}" for item, verbs in ACTIONS.items() for verb in verbs]
    actions, sentences = [], []
    # An action occurs at most once in a video, so that every sentence has one moment.
    for action in rng.permutation(all_actions)[: int(rng.integers(2, 5))].tolist():
        verb, item = action.split()
        length = max(float(rng.uniform(0.12, 0.45)) * duration, 2.0)
        start = round(float(rng.uniform(0, duration - length)), 1)
        end = round(min(start + length, duration), 1)
        actions.append((action, start, end))
        does, doing = VERBS[verb]
        for template in rng.permutation(len(TEMPLATES))[: int(rng.integers(1, 3))].tolist():
            sentence = TEMPLATES[template].format(does=does, doing=doing, item=item, scene=scene)
            sentences.append(f"{name} {start} {end}##{sentence}")
    objects = tuple(sorted({action.split()[1] for action, _, _ in actions}))
    return Scenario(name, num_frames, duration, scene, objects, tuple(actions)), rate, sentences


# The strings in these parts seed the embeddings, so that changing them changes all simulated features.
def _action_parts(action: str) -> list[tuple[str, float]]:
    """Return the parts of a synthetic action: itself, its verb and its object."""
    verb, item = action.split()
    return [(f"deed {action}", 0.5), (f"verb {verb}", 0.25), (f"thing {item}", 0.25)]


def _confusable_actions(action: str) -> list[str]:
    """Return the synthetic actions with the same verb, or the same object."""
    verb, item = action.split()
    pairs = [(other_verb, other_item) for other_item, verbs in ACTIONS.items() for other_verb in verbs]
    return [f"{other[0]} {other[1]}" for other in pairs if (other[0] == verb) != (other[1] == item)]
