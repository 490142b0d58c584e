"""Simulate the clip features of a data set, of synthetic videos or real annotations: `python -m train.simulate`."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from runtime.core.cli import command, report_many_written, report_written, suggest_next_command
from runtime.core.differences import differences
from runtime.core.errors import AnnotationError, FeatureError, OutputError, check_option, excerpt
from runtime.core.io.atomic_files import atomic_write, content_names, locked, remove_strays, write_json, write_text
from runtime.core.io.digests import sha256
from runtime.core.io.input_files import check_directory, read_json
from train.simulation.charades_actions import charades_plan
from train.simulation.feature_simulator import (
    DIFFICULTIES,
    GAIN_SPREAD,
    NOISE_SECONDS,
    POWER,
    ZERO_FRACTION,
    Simulator,
    latent_dim,
)
from train.simulation.from_captions import captions_plan
from train.simulation.scenario import CLIP_TIMING, Scenario, SimulationPlan
from train.simulation.synthetic_videos import synthetic_plan

log = logging.getLogger("drn.simulate")

DONE_MARKER, IN_PROGRESS_MARKER = "simulated.json", ".simulating.json"
SYNTHETIC_VIDEOS = 300
# Increased when the same parameters produce other features, so that a resumed run never mixes two versions.
RECIPE = 1


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
    """Write a data set with simulated clip features in its published layout.

    Without --annotations, videos, sentences and moments are synthetic, in the layout of Charades-STA; with it, the
    annotation files are copied. On Charades-STA the features follow the human action labels in
    Charades_v1_train.csv and Charades_v1_test.csv. ActivityNet Captions and TACoS have no such labels; there the
    features follow the content words of the sentences, so that recall only shows that the pipeline works. Recall on
    simulated features is not comparable with published numbers.

    The same arguments produce the same files, and the features of a video do not depend on the other videos. Repeat
    the same command to resume an interrupted run.

    Args:
        output: directory to create; it must be new, empty, or written by the same command.
        annotations: directory with the Charades-STA text files, JSON tables and both Charades_v1 csv files; or with
            train.json, val.json and test.json of ActivityNet Captions or TACoS.
        feature_dim: feature channels D per clip (published: 4096 for Charades-STA and TACoS, 500 for ActivityNet).
        videos: without --annotations, number of videos (default 300, one in five for testing); with it, maximum
            number of videos per split, chosen by the seed.
        difficulty: how hard the actions are to recognize in the features.
        seed: random seed.
        dtype: data type of the stored features.
        file_format: npy loads faster and without torch; pt is the published format.

    Returns:
        The directory written.

    Raises:
        AnnotationError: annotation files are missing, malformed or contradict each other.
        FeatureError: the requested size is not possible.
        OutputError: the directory contains other files, or cannot be written.
    """
    result = run(SimulationOptions(**locals()))
    contents = result.record["contents"]
    print(f"{output}: {contents['videos']} videos, {contents['clips']} clips of {feature_dim} channels ({difficulty}).")
    for split, count in contents["moments"].items():
        print(f"{split}: {count} moments")
    print(result.record["statement"])
    report_many_written("feature", result.features)
    report_written(*result.files)
    suggest_next_command("train", "--data", output, "--output", "runs/simulated")
    return output


@dataclass(frozen=True)
class SimulationOptions:
    """The options of a simulation; see `simulate`."""

    output: Path
    annotations: Path | None
    feature_dim: int
    videos: int | None
    difficulty: str
    seed: int
    dtype: str
    file_format: str

    def validate(self) -> None:
        """Check the options before anything is read.

        Raises:
            FeatureError: an option is out of range.
            AnnotationError: the directory of annotations does not exist.
        """
        min_videos = 1 if self.annotations else 2
        for flag, value, minimum in (
            ("--feature-dim", self.feature_dim, 1),
            ("--videos", self.videos, min_videos),
            ("--seed", self.seed, 0),
        ):
            check_option(flag, value, minimum, error=FeatureError)
        for flag, name, names in (
            ("--difficulty", self.difficulty, tuple(DIFFICULTIES)),
            ("--dtype", self.dtype, ("float16", "float32")),
            ("--file-format", self.file_format, ("npy", "pt")),
        ):
            if name not in names:
                raise FeatureError(
                    f"Expected {flag} to be {' or '.join(names)}, got {excerpt(name)}. Correct the option.",
                    code="invalid_option",
                )
        if self.annotations is not None:
            check_directory(self.annotations, "The directory of annotations", AnnotationError)

    def plan(self) -> SimulationPlan:
        """Return the data set to simulate.

        Raises:
            AnnotationError: its annotations are missing or invalid.
        """
        if self.annotations is None:
            return synthetic_plan(self.videos or SYNTHETIC_VIDEOS, self.seed)
        if any((self.annotations / f"{split}.json").exists() for split in ("train", "val", "test")):
            return captions_plan(self.annotations, self.videos, self.seed)
        return charades_plan(self.annotations, self.videos, self.seed)

    def parameters(self, sources: Sequence[str]) -> dict[str, Any]:
        """Return the parameters that determine the files, with the digests of the annotation files `sources`."""
        annotations = self.annotations
        return {
            "recipe": RECIPE,
            "seed": self.seed,
            "difficulty": self.difficulty,
            "feature_dim": self.feature_dim,
            "videos": self.videos if annotations or self.videos else SYNTHETIC_VIDEOS,
            "dtype": self.dtype,
            "file_format": self.file_format,
            "annotations": {name: sha256(annotations / name) for name in sources} if annotations else None,
        }


@dataclass(frozen=True)
class SimulationResult:
    """The content of `simulated.json`, and the feature files and the other files that were written."""

    record: dict[str, Any]
    features: list[Path]
    files: list[Path]


def run(options: SimulationOptions) -> SimulationResult:
    """Write the data set, or complete an interrupted one; see `simulate`."""
    options.validate()
    plan = options.plan()
    parameters = options.parameters(plan.sources)
    output = options.output
    _check_output(output, parameters)
    with locked(output):
        _check_output(output, parameters, quiet=False)
        folder = output / plan.directory
        paths = {folder / f"{scenario.name}.{options.file_format}": scenario for scenario in plan.scenarios}
        missing = {path: scenario for path, scenario in paths.items() if not path.exists()}
        _check_space(output, missing.values(), options.feature_dim * np.dtype(options.dtype).itemsize)
        _mark_in_progress(output, folder, parameters, plan.statement)
        if missing:
            simulator = Simulator(plan, DIFFICULTIES[options.difficulty], options.feature_dim, options.seed)
            _write_features(missing, simulator, options.dtype, options.file_format)
        # The annotations come after the features and the marker last, so that an interrupted run never looks complete.
        for name, text in plan.texts.items():
            write_text(output / name, text)
        record = _record(options, plan, parameters)
        write_json(output / DONE_MARKER, record)
        (output / IN_PROGRESS_MARKER).unlink(missing_ok=True)
    return SimulationResult(record, list(missing), [output / name for name in (*plan.texts, DONE_MARKER)])


def _record(options: SimulationOptions, plan: SimulationPlan, parameters: dict[str, Any]) -> dict[str, Any]:
    return {
        "statement": plan.statement,
        "parameters": parameters,
        "model": {
            "window": CLIP_TIMING.window,
            "stride": CLIP_TIMING.stride,
            "latent_dim": latent_dim(options.feature_dim),
            "zero_fraction": ZERO_FRACTION,
            "power": POWER,
            "gain_spread": GAIN_SPREAD,
            "noise_seconds": NOISE_SECONDS,
            **asdict(DIFFICULTIES[options.difficulty]),
        },
        "contents": {
            **plan.contents,
            "videos": len(plan.scenarios),
            "clips": sum(scenario.num_clips for scenario in plan.scenarios),
        },
    }


def _check_output(output: Path, parameters: dict[str, Any], quiet: bool = True) -> None:
    """Raise OutputError unless `output` is new, empty, or was written by the same command."""
    if output.exists() and not output.is_dir():
        raise OutputError(f"--output {output} is a file. Choose a directory.", code="output_is_file")
    try:
        names = content_names(output)
    except OSError as error:
        raise OutputError(
            f"{output} cannot be read: {error.strerror}. Choose another --output.", code="unreadable_file"
        ) from error
    if not names:
        return
    marker = next((name for name in (DONE_MARKER, IN_PROGRESS_MARKER) if name in names), None)
    if marker is None:
        raise OutputError(
            f"{output} contains {names[0]}, which train.simulate did not write. Choose a new --output.",
            code="output_not_empty",
        )
    record = read_json(output / marker, "the record of a simulation", OutputError)
    recorded = record.get("parameters") if isinstance(record, dict) else None
    if recorded != parameters:
        changed = [str(path[0]) for path, _, _ in differences(recorded, parameters) if path]
        raise OutputError(
            f"{output} contains another simulation (different: {', '.join(changed) or 'parameters'}). "
            "Choose a new --output, or delete the directory.",
            code="settings_mismatch",
        )
    if not quiet:
        log.info("%s was started by the same command; its existing features are used.", output)


def _mark_in_progress(output: Path, folder: Path, parameters: dict[str, Any], statement: str) -> None:
    """Mark `output` as an incomplete simulation with these parameters, and create the folder of its features."""
    write_json(output / IN_PROGRESS_MARKER, {"statement": statement, "parameters": parameters})
    try:
        (output / DONE_MARKER).unlink(missing_ok=True)
        folder.mkdir(exist_ok=True)
        remove_strays(folder)
    except OSError as error:
        raise OutputError(f"{output} cannot be written: {error.strerror}. Choose another --output.") from error


def _check_space(output: Path, scenarios: Collection[Scenario], bytes_per_clip: int) -> None:
    """Raise OutputError if the features do not fit on the disk."""
    needed = sum(scenario.num_clips for scenario in scenarios) * bytes_per_clip
    existing = next(path for path in (output, *output.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise OutputError(
            f"The features need {needed / 1e6:,.0f} MB, but the disk of {output} has {free / 1e6:,.0f} MB free. "
            "Free some space, or pass fewer --videos or a smaller --feature-dim.",
            code="disk_full",
        )


def _write_features(scenarios: Mapping[Path, Scenario], simulator: Simulator, dtype: str, file_format: str) -> None:
    from tqdm import tqdm

    write = _write_npy if file_format == "npy" else _write_pt
    for path, scenario in tqdm(scenarios.items(), desc="features", unit="video", disable=None, leave=False):
        write(path, simulator.features(scenario).astype(dtype))


def _write_npy(path: Path, features: np.ndarray) -> None:
    with atomic_write(path) as temporary, temporary.open("wb") as stream:
        # np.save raises an OSError without an error number if the disk is full.
        np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(features))
        stream.write(features.data)


def _write_pt(path: Path, features: np.ndarray) -> None:
    import torch

    from train.checkpoints import save

    save(path, torch.from_numpy(features))


if __name__ == "__main__":
    command(simulate)
