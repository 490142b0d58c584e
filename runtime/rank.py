"""`python -m runtime.rank`: rank videos for each query by their best moment."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm

from runtime.backends.base import Device
from runtime.core.cli import command, report_written, suggest_next_command
from runtime.core.errors import check_option
from runtime.core.io.atomic_files import check_report, write_json
from runtime.datasets.dataset import DataSet, Invalid
from runtime.grounding.evaluation import askable_rows
from runtime.grounding.grounder import BATCH_SIZE, Grounder
from runtime.grounding.retrieval import Ranking, best_scores, draw_videos
from runtime.grounding.retrieval import rank as rank_scores


def rank(
    model: Path,
    data: Path,
    *,
    videos: int = 100,
    split: str = "test",
    seed: int = 0,
    output: Path | None = None,
    invalid: Invalid = "error",
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
    device: Device = "auto",
    threads: int | None = None,
) -> Ranking:
    """Rank the videos of a split for each query, and compare the rank of the correct video with chance.

    Each query is grounded in its own video and in other videos of the split, drawn at random; videos are ranked by
    their best moment. Another video may also show what the query describes, so no model reaches 100 %.

    Example:
        python -m runtime.rank --model drn.query.onnx --data charades --videos 100

    Args:
        model: .onnx, .engine or .pt file. For a split model give the query part, so that each video is encoded
            once.
        data: directory of a data set. docs/formats.md lists the formats.
        videos: number of videos per query, with the correct one.
        split: split of the queries: train, val or test.
        seed: random seed of the choice of other videos.
        output: JSON file to write the metrics and the rank of each query to.
        invalid: what to do with a moment that ends before it starts or starts after its video: stop, drop it
            with a warning, or keep it.
        limit: use only the first N queries.
        batch_size: number of query-video pairs per batch; affects only the speed.
        device: device that runs the model; auto selects cuda if it is available.
        threads: number of CPU threads. Default: set by the library that runs the model.
    """
    check_option("--videos", videos, 2)
    check_option("--seed", seed, 0)
    check_option("--limit", limit, 1)
    check_option("--batch-size", batch_size, 1)
    data_set = DataSet(data)
    check_report(output, model, *data_set.files)
    annotations = data_set.annotations(split, invalid)
    names = sorted({annotation.video for annotation in annotations})
    grounder = Grounder.load(model, device, threads)
    annotations = annotations[:limit]
    annotations = [annotations[row] for row in askable_rows(grounder.manifest.vocabulary, annotations)]
    number = {name: index for index, name in enumerate(names)}
    own = np.array([number[annotation.video] for annotation in annotations])
    requested = draw_videos(own, len(names), videos - 1, seed)
    data_set.check_clock(grounder.manifest.features.clock)
    with tqdm(total=requested.size, desc="scoring", unit="pair", leave=False, disable=None) as bar:
        scores = best_scores(
            grounder,
            data_set,
            [annotation.sentence for annotation in annotations],
            names,
            requested,
            batch_size=batch_size,
            on_progress=bar.update,
        )
    ranking = rank_scores(scores)
    _print_table({model.name: ranking.values, "chance": ranking.chance})
    print(f"{len(annotations)} queries of {split}, each with {videos} of {len(names)} videos, in percent.")
    if data_set.simulated:
        print("The features are simulated: the results are not comparable with published numbers.")
    if output:
        results = {**ranking.values, "chance": ranking.chance, "sentences": len(annotations), "videos": videos}
        settings = {"split": split, "seed": seed, "simulated_features": data_set.simulated, "model": model.name}
        write_json(output, {**results, **settings, "ranks": ranking.ranks.tolist()})
        report_written(output)
    suggest_next_command("runtime.evaluate", "--model", model, "--data", data)
    return ranking


def _print_table(rows: Mapping[str, Mapping[str, float]]) -> None:
    """Print metrics by model, in percent except for ranks."""
    width = max(map(len, rows))
    print(" " * width + "".join(f"  {name:>11}" for name in next(iter(rows.values()))))
    for label, values in rows.items():
        cells = (f"{value if name == 'median rank' else 100 * value:>11.2f}" for name, value in values.items())
        print(f"{label:<{width}}  " + "  ".join(cells))


if __name__ == "__main__":
    command(rank)
