"""Every command names the files that it writes in lines "Written: FILE"; the fixture `run_command` compares them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

from runtime.core import command_list
from tests.contract_recorder import command_function
from tests.films import film
from tests.runtime.media.extractor_graphs import CLIPS, write_clips
from tests.train.training.narrow import narrow_backbone
from tests.written import check_written, file_versions

__all__ = ["narrow_backbone"]

# The words of each command whose files no page names. IN has the inputs; outputs are in the working directory.
COMMANDS = {
    "runtime.rank": "IN/drn.onnx --data IN/data --videos 3 --limit 4 --output ranks.json",
    "runtime.evaluate": "IN/drn.onnx --data IN/data --output report.json --predictions predictions.jsonl",
    "train.simulate": "--output simulated --videos 4 --feature-dim 8",
    "export.verify": "--model IN/drn.onnx --reference IN/drn.pt --data IN/data --limit 4 --output parity.json "
    "--html parity.html",
    "export.triton": "IN/drn.onnx --output repository",
    "export.seal": "sealed.onnx",
    "calib.calibrate": "IN/drn.onnx --data IN/data --samples 32 --method minmax --output drn.calibration.json",
    "calib.quantize": "IN/drn.onnx --table IN/drn.calibration.json --output drn.int8.onnx",
    "calib.restore": "IN/drn.onnx --data IN/data --table IN/drn.calibration.json --held-out 8 --max-drop 100 "
    "--output drn.plan.json",
}
# Run by `run_command` in test_pages.py and in other tests, with all of their files.
ELSEWHERE = {
    "runtime.infer", "runtime.benchmark", "runtime.benchmarking.compare", "runtime.extract", "runtime.ground_corpus",
    "train", "train.convert", "train.prepare", "train.fit_presence", "export.to_onnx", "export.build_engine",
    "calib.rank_layers",
}  # fmt: skip
WRITE_NOTHING = {"runtime.serve", "runtime.describe", "runtime.grounding.words", "runtime.doctor"}


@pytest.fixture(scope="module")
def inputs(models: Path, planted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the inputs of the commands."""
    from calib.calibrate import calibrate

    directory = tmp_path_factory.mktemp("inputs")
    for name in ("drn.pt", "drn.onnx"):
        (directory / name).symlink_to(models / name)
    (directory / "data").symlink_to(planted)
    calibrate(models / "drn.onnx", planted, directory / "drn.calibration.json", samples=32, method="minmax", threads=1)
    return directory


def test_commands_that_write_files_are_tested() -> None:
    assert {*COMMANDS, *ELSEWHERE, *WRITE_NOTHING} == set(command_list.MODULES.values())


@pytest.mark.parametrize("name", COMMANDS)
def test_command_names_the_files_that_it_writes(
    name: str, inputs: Path, tmp_path: Path, run_command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "export.seal":
        onnx.save(onnx.load(inputs / "drn.onnx"), tmp_path / "sealed.onnx")
    words = COMMANDS[name].replace("IN/", f"{inputs}/").split()
    run_command(command_function(name), *words)


def test_repeated_extraction_names_no_files(tmp_path: Path, run_command: Any) -> None:
    video, extractor = film(tmp_path / "clip.mp4", 40), write_clips(tmp_path / "clips.onnx", CLIPS)
    words = [video, "--extractor", extractor, "--output", tmp_path / "features"]
    for _ in range(2):
        run_command(command_function("runtime.extract"), *words)


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["Written: one.txt"],
        ["Written: one.txt", "Written: 3 text files in many"],
        ["Written: 4 text files in ."],
        ["Written: one.txt", "Written: 2 text files in many", "Written: old.txt"],
        ["Written: one.txt", "Written: 2 text files in many", "Written: missing.txt"],
        ["Written: one.txt", "Written: 2 text files in many", "Written: one.txt"],
    ],
)
def test_check_rejects_lines_that_differ_from_files(lines: list[str], tmp_path: Path) -> None:
    (tmp_path / "old.txt").touch()
    before = file_versions(tmp_path)
    (tmp_path / "many").mkdir()
    for name in ("one.txt", "many/two.txt", "many/three.txt"):
        (tmp_path / name).touch()
    check_written(tmp_path, before, ["Written: one.txt", "Written: 2 text files in many"])
    with pytest.raises(AssertionError):
        check_written(tmp_path, before, lines)
