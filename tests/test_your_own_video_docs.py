"""The commands of `docs/your-own-video.md` run as they stand, on a small C3D, a small model and made-up videos."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch

from export.to_onnx import export_model
from runtime.annotations import DataSet
from runtime.extractors import FORMAT, ExtractorManifest
from runtime.vocabulary import Vocabulary
from tests.export.conftest import TINY, lively, manifest
from tests.films import film
from tests.test_readme import test_every_command_of_the_readme_parses as check_parses
from train.c3d import C3D, MEANS, C3DConfig

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "your-own-video.md").read_text(encoding="utf-8")
LINES, *OTHERS = [block.splitlines() for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where what the page starts from stands: c3d.pickle, drn.onnx, and two videos."""
    directory = tmp_path_factory.mktemp("own")
    words = {word: number for number, word in enumerate(("person", "opens", "closes", "the", "door"), 1)}
    config = dataclasses.replace(TINY, vocab_size=len(words))
    told = dataclasses.replace(manifest(config), vocabulary=Vocabulary(words))
    onnx.save(export_model(lively(config), told), directory / "drn.onnx")
    torch.manual_seed(0)
    state = C3D(C3DConfig((4, 4, 8, 8, 8, 8, 8, 8), config.feature_dim), (0.0, 0.0, 0.0)).state_dict()
    renamed = {name.replace("v1a", "v1").replace("v2a", "v2"): value for name, value in state.items()}
    torch.save(renamed, directory / "c3d.pickle", _use_new_zipfile_serialization=False)
    film(directory / "clip.mp4", 100)
    film(directory / "other.mkv", 60)
    return directory


def test_the_walk_through_runs_as_it_stands(directory: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DRN_CACHE": str(directory / "kept")}
    said = []
    for line in LINES:
        arguments = re.sub(r"^python ", f"{sys.executable} ", line)
        result = subprocess.run(["sh", "-c", arguments], cwd=directory, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"
        assert "Next:" in result.stderr
        said.append(result.stdout)
    assert "clip (0:04.0)" in said[2]
    assert "person opens the door" in said[2]
    data = DataSet(directory / "mine")
    assert {name: len(data.video(name).features) for name in data.durations} == {"clip": 11, "other": 6}
    # The last command asks of the stored features what the third asked of the file.
    assert said[4].strip() in said[2]


def test_the_description_on_the_page_is_one() -> None:
    (text,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    found = ExtractorManifest.from_dict(json.loads(text), "the page")
    assert (found.dim, found.resize, found.crop, found.white) == (512, 224, (224, 224), 1.0)
    assert json.loads(text)["format"] == FORMAT


def test_the_means_on_the_page_are_those_of_the_code() -> None:
    for mean in MEANS.values():
        assert ", ".join(f"{value:g}" for value in mean) in PAGE


@pytest.mark.parametrize("line", [line for block in OTHERS for line in block])
def test_the_other_commands_parse(line: str, tmp_path: Path) -> None:
    check_parses(line, tmp_path)
