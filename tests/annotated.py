"""Small annotations in the published layouts, made up for tests: who does what, when."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

DEEDS = ("opens the door", "washes a cup", "peels a carrot", "throws the ball", "rides a horse", "cuts the bread")
VIDEOS = {"train": 24, "val": 6, "test": 6}


def write_activitynet(directory: Path) -> Path:
    """Write 36 videos of ActivityNet Captions' layout, with 3 sentences each."""
    return _write(directory, "v_", lambda duration, moments: {"duration": duration, "timestamps": moments})


def write_tacos(directory: Path) -> Path:
    """Write 36 videos of TACoS's layout, with 3 sentences each."""

    def entry(duration: float, moments: list[list[float]]) -> dict[str, Any]:
        frames = [[round(second * 29.4) for second in moment] for moment in moments]
        return {"fps": 29.4, "num_frames": round(duration * 29.4), "timestamps": frames}

    return _write(directory, "s1-d", entry, ".avi")


def write_qvhighlights(directory: Path, dim: int = 8) -> Path:
    """Write 24 and 6 videos of QVHighlights' layout with a query each, of one or two moments, and features for them."""
    rng = np.random.default_rng(0)
    (directory / "features").mkdir(parents=True)
    for split in ("train", "val"):
        rows = []
        for index in range(VIDEOS[split]):
            name = f"{split}{index}_0.0_150.0"
            starts = rng.integers(0, 30, 1 + index % 2)
            moments = [[float(60 * slot + start), float(60 * slot + start + 20)] for slot, start in enumerate(starts)]
            query = f"A person {DEEDS[index % len(DEEDS)]}."
            rows.append(
                {"qid": 100 + 7 * index, "query": query, "vid": name, "duration": 150, "relevant_windows": moments}
            )
            np.savez(directory / "features" / f"{name}.npz", features=rng.random((75, dim), np.float32))
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"highlight_{split}_release.jsonl").write_text(text)
    return directory


def _write(directory: Path, prefix: str, entry: Any, suffix: str = "") -> Path:
    rng = np.random.default_rng(0)
    directory.mkdir(parents=True, exist_ok=True)
    number = 0
    for split, count in VIDEOS.items():
        entries = {}
        for _ in range(count):
            number += 1
            duration = round(float(rng.uniform(20, 60)), 2)
            starts = sorted(rng.uniform(0, 0.8 * duration, 3).tolist())
            moments = [[round(start, 2), round(start + 0.2 * duration, 2)] for start in starts]
            deeds = rng.permutation(len(DEEDS))[:3]
            sentences = [f"The person {DEEDS[deed]}." for deed in deeds]
            entries[f"{prefix}{number}{suffix}"] = {**entry(duration, moments), "sentences": sentences}
        (directory / f"{split}.json").write_text(json.dumps(entries))
    return directory
