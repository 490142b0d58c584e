"""Run the commands of `docs/triton.md` with a small graph and a test double of Triton."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np

from export.triton.writer import read_config
from runtime import Grounder
from runtime.datasets.dataset import DataSet
from tests.documented import ROOT, lines_run_by
from tests.forked_commands import ForkedCommand
from tests.tritonserver import Server
from tests.tritonwire import Wire, over_grpc

PAGE = (ROOT / "docs" / "triton.md").read_text(encoding="utf-8")
WRITE, INFER, EVALUATE = (line.text for line in lines_run_by("tests/runtime/triton/test_docs.py"))


def run(line: str, directory: Path) -> subprocess.CompletedProcess[str]:
    environment = {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(directory)}
    return ForkedCommand(shlex.split(line, comments=True), environment, directory).finish()


def test_documented_commands_serve_and_query_a_model(tiny_model: Path, mini: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_model, tmp_path / "drn.onnx")
    shutil.copytree(mini, tmp_path / "charades")
    np.save(tmp_path / "3MSZA.npy", DataSet(mini).video("AAAA1").features)
    written = run(WRITE, tmp_path)
    assert written.returncode == 0, written.stderr
    assert "Next:  drn infer --model triton://localhost:8001/drn" in written.stderr
    with over_grpc(Wire(Server(tmp_path / "repository"))) as port:
        for line in (INFER, EVALUATE):
            assert "triton://localhost:8001/drn" in line
            served, file = (
                run(line.replace("triton://localhost:8001/drn", model), tmp_path)
                for model in (f"triton://127.0.0.1:{port}/drn", "drn.onnx")
            )
            assert served.returncode == 0, served.stderr
            assert served.stdout.split() == file.stdout.replace("drn.onnx", "drn").split()


def test_documented_inputs_match_the_front_model_config(tiny_model: Path, tmp_path: Path) -> None:
    from export.triton import triton

    config = read_config(triton(tiny_model, tmp_path / "repository") / "drn" / "config.pbtxt")
    kinds = type(config).DESCRIPTOR.file.enum_types_by_name["DataType"].values_by_number
    names = {"TYPE_STRING": "BYTES"}
    listed = re.findall(r"^\| `([A-Z_]+)` \| \(B, (.*)\) \| (\w+) \| (optional)?", PAGE, re.MULTILINE)
    known = [
        (value.name, len(value.dims), names.get(kinds[value.data_type].name, kinds[value.data_type].name[5:]))
        for value in (*config.input, *config.output)
    ]
    assert [(name, len(dims.split(",")), kind) for name, dims, kind, _ in listed] == known
    assert [name for name, *_, optional in listed if optional] == [v.name for v in config.input if v.optional]


def test_documented_json_request_is_valid(tiny_model: Path) -> None:
    request = json.loads(re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)[0])
    assert [value["name"] for value in request["inputs"]] == ["QUERY", "FEATURES", "DURATION"]
    for value in request["inputs"]:
        assert len(value["data"]) == np.prod(value["shape"])
    (query,) = request["inputs"][0]["data"]
    assert len(Grounder.load(tiny_model, "cpu").encode_query(query))
