"""The commands of `docs/tools.md` run as they stand, on a network small enough for a test."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from calib.calibration_table import CalibrationTable, calibration_key
from calib.graph.half_precision import convert_to_half
from calib.qdq_quantizer import channel_energies, insert_qdq
from calib.range_estimation import collect_statistics
from export.tracing.tracer import export_model
from runtime.core.batch import Batch
from tests.documented import lines_run_by
from tests.export.conftest import TINY, lively, manifest, random_inputs

LINES = [line.text for line in lines_run_by("tests/test_tools_docs.py")]
POLYGRAPHY, SURGEON, QUERY = LINES[:7], LINES[7:10], LINES[10:]
RTX = "POLYGRAPHY_USE_TENSORRT_RTX=1 "


def needs(*modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")


def run(line: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run a line of the page in a shell, with T and D of the network there in place of the full ones."""
    small = line.replace("32,4096]", f"{TINY.num_segments},{TINY.feature_dim}]")
    small = small.replace(",32,2]", f",{TINY.num_segments},2]")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(["sh", "-c", small], cwd=directory, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where drn.onnx, drn.fp16.onnx and drn.int8.onnx stand."""
    directory = tmp_path_factory.mktemp("tools")
    model = export_model(lively(TINY), manifest(TINY))
    batches = [Batch(*(tensor.numpy() for tensor in random_inputs(TINY, [4, 9, 1, 12])))]
    table = CalibrationTable(
        collect_statistics(model, channel_energies(model), batches).ranges("minmax"),
        calibration_key(model, "0" * 64, "minmax"),
    )
    onnx.save(model, directory / "drn.onnx")
    onnx.save(convert_to_half(model), directory / "drn.fp16.onnx")
    onnx.save(convert_to_half(insert_qdq(model, table, opset=19)), directory / "drn.int8.onnx")
    return directory


def test_tools_page_lists_the_tested_commands() -> None:
    assert [line.removeprefix(RTX).split()[1] for line in POLYGRAPHY] == [
        "inspect",
        "run",
        "run",
        "run",
        "inspect",
        "inspect",
        "convert",
    ]
    assert [line.split()[1:3] for line in SURGEON] == [
        ["check", "lint"],
        ["surgeon", "extract"],
        ["surgeon", "sanitize"],
    ]
    assert [line.startswith(RTX) for line in POLYGRAPHY] == [False] * 5 + [True] * 2


def test_polygraphy_reads_runs_and_compares_our_graphs(directory: Path) -> None:
    needs("polygraphy")
    for line in POLYGRAPHY:
        if line.startswith(RTX):
            continue
        result = run(line, directory)
        assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"
        if "--load-outputs" in line:
            assert (
                "All outputs matched | Outputs: ['matching_logits', 'boundary_distances', 'iou_logits']"
                in result.stdout
            )
    # The same comparison must notice a graph that is wrong.
    wrong = onnx.load(directory / "drn.fp16.onnx")
    (bias,) = [tensor for tensor in wrong.graph.initializer if tensor.name.startswith("fcos.head.predictions.bias")]
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float16(0.2), bias.name))
    onnx.save(wrong, directory / "wrong.onnx")
    assert run(POLYGRAPHY[2].replace("drn.fp16.onnx", "wrong.onnx"), directory).returncode == 1


@pytest.mark.rtx
def test_polygraphy_builds_our_graphs_in_tensorrt_rtx(directory: Path) -> None:
    needs("polygraphy", "tensorrt_rtx")
    capability, convert = (line for line in POLYGRAPHY if line.startswith(RTX))
    result = run(capability, directory)
    assert "Graph is fully supported by TensorRT" in result.stdout, result.stdout + result.stderr
    result = run(convert, directory)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "STRONGLY_TYPED" in result.stdout
    assert (directory / "polygraphy.engine").stat().st_size > 10_000


def test_polygraphy_cuts_and_folds_our_graphs(directory: Path) -> None:
    needs("polygraphy", "onnx_graphsurgeon")
    for line in SURGEON:
        result = run(line, directory)
        assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"
    part, folded = (onnx.load(directory / name) for name in ("part.onnx", "folded.onnx"))
    assert [node.op_type for node in part.graph.node] == ["Transpose", "Unsqueeze", "Conv"]
    assert not part.metadata_props
    assert not folded.metadata_props


def test_trtexec_query_files_contain_twelve_tokens(directory: Path) -> None:
    (line,) = QUERY
    assert run(line, directory).returncode == 0
    assert np.fromfile(directory / "tokens.bin", np.int32).tolist() == [2] * 12
    assert np.fromfile(directory / "length.bin", np.int32).tolist() == [12]
