"""The commands of `docs/tools.md` run as they stand, on a network small enough for a test."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from calib.calibration_table import CalibrationTable, calibration_key
from calib.graph.gate_normalization import normalize_gated_features
from calib.graph.half_precision import convert_to_half
from calib.qdq_quantizer import channel_energies, insert_qdq
from calib.range_estimation import collect_statistics
from export.tracing.tracer import export_model
from runtime.core.batch import HEAD_NAMES, Batch
from tests.documented import lines_run_by
from tests.export.conftest import TINY, lively, manifest, random_inputs
from tests.raising import quotes
from tests.train.training.narrow import narrow_backbone

__all__ = ["narrow_backbone"]

LINES = [line.text for line in lines_run_by("tests/test_tools_docs.py")]
POLYGRAPHY, SURGEON, QUERY = LINES[:7], LINES[7:10], LINES[10:]
RTX = "POLYGRAPHY_USE_TENSORRT_RTX=1 "


def needs(*modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")


def small(line: str) -> str:
    """Return a line of the page with T and D of the network there in place of the full ones."""
    line = line.replace("32,4096]", f"{TINY.num_segments},{TINY.feature_dim}]")
    return line.replace(",32,2]", f",{TINY.num_segments},2]")


def shell(line: str, directory: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(["sh", "-c", small(line)], cwd=directory, env=environment, capture_output=True, text=True)


def polygraphy(line: str, directory: Path) -> tuple[int, str]:
    """Run a `polygraphy` line in this process, which saves seconds of imports; return exit code and output."""
    from polygraphy.tools import main

    output = io.StringIO()
    with contextlib.chdir(directory), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = main(shlex.split(small(line), comments=True)[1:])
    return code, output.getvalue()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where drn.onnx, drn.fp16.onnx and drn.int8.onnx stand."""
    directory = tmp_path_factory.mktemp("tools")
    model = export_model(lively(TINY), manifest(TINY))
    batches = [Batch(*(tensor.numpy() for tensor in random_inputs(TINY, [4, 9, 1, 12])))]
    observed = normalize_gated_features(model)
    table = CalibrationTable(
        collect_statistics(observed, channel_energies(observed), batches).ranges("minmax"),
        calibration_key(model, "0" * 64, "minmax"),
    )
    onnx.save(model, directory / "drn.onnx")
    onnx.save(convert_to_half(model), directory / "drn.fp16.onnx")
    onnx.save(convert_to_half(insert_qdq(model, table, opset=19)), directory / "drn.int8.onnx")
    return directory


def test_tools_page_lists_the_tested_commands() -> None:
    tools = [line.removeprefix(RTX).split()[1] for line in POLYGRAPHY]
    assert tools == ["inspect", "run", "run", "run", "inspect", "inspect", "convert"]
    assert [line.split()[1:3] for line in SURGEON] == [
        ["check", "lint"],
        ["surgeon", "extract"],
        ["surgeon", "sanitize"],
    ]
    assert [line.startswith(RTX) for line in POLYGRAPHY] == [False] * 5 + [True] * 2


def test_polygraphy_reads_runs_and_compares_our_graphs(directory: Path) -> None:
    needs("polygraphy")
    for line in POLYGRAPHY[:5]:
        code, output = polygraphy(line, directory)
        assert code == 0, f"{line}\n{output}"
        if "--load-outputs" in line:
            assert quotes(output, "All outputs matched", *HEAD_NAMES)
    # The same comparison must notice a graph that is wrong.
    wrong = onnx.load(directory / "drn.fp16.onnx")
    (bias,) = [tensor for tensor in wrong.graph.initializer if tensor.name.startswith("fcos.head.predictions.bias")]
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float16(0.2), bias.name))
    onnx.save(wrong, directory / "wrong.onnx")
    assert polygraphy(POLYGRAPHY[2].replace("drn.fp16.onnx", "wrong.onnx"), directory)[0] == 1


@pytest.mark.rtx
def test_polygraphy_builds_our_graphs_in_tensorrt_rtx(directory: Path) -> None:
    needs("polygraphy", "tensorrt_rtx")
    capability, convert = (shell(line, directory) for line in POLYGRAPHY if line.startswith(RTX))
    assert "Graph is fully supported by TensorRT" in capability.stdout, capability.stdout + capability.stderr
    assert convert.returncode == 0, convert.stdout + convert.stderr
    assert "STRONGLY_TYPED" in convert.stdout
    assert (directory / "polygraphy.engine").stat().st_size > 10_000


def test_polygraphy_cuts_and_folds_our_graphs(directory: Path) -> None:
    needs("polygraphy", "onnx_graphsurgeon")
    for line in SURGEON:
        code, output = polygraphy(line, directory)
        assert code == 0, f"{line}\n{output}"
    part, folded = (onnx.load(directory / name) for name in ("part.onnx", "folded.onnx"))
    assert [node.op_type for node in part.graph.node] == ["Transpose", "Unsqueeze", "Conv"]
    assert not part.metadata_props
    assert not folded.metadata_props


def test_trtexec_query_files_contain_twelve_tokens(directory: Path) -> None:
    (line,) = QUERY
    assert shell(line, directory).returncode == 0
    assert np.fromfile(directory / "tokens.bin", np.int32).tolist() == [2] * 12
    assert np.fromfile(directory / "length.bin", np.int32).tolist() == [12]
