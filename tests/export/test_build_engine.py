"""`export.build_engine`: the main job on a CPU: the twin, its proof, an engine ahead of time, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from export.build_engine import build_engine, choose_target
from export.builder import cuda_devices
from runtime import Grounder
from runtime.errors import DeviceError, GroundingError, ModelFileError, OutputError, PromiseBroken, ShapeError
from runtime.sidecar import read_sidecar

# A network this small loses more to eight bits than a real one, on thirty queries where one is three points.
LOOSE = 100.0


@pytest.fixture
def model(models: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "drn.onnx"
    copy.write_bytes((models / "drn.onnx").read_bytes())
    return copy


def test_fp16_writes_a_twin_that_answers_alike(model: Path, planted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = build_engine(model, precision="fp16", data=planted, query_length=(1, 8, 12))
    assert output == model.with_name("drn.fp16.onnx")
    told = capsys.readouterr().out
    assert "fp16 of the multiply-adds" in told
    assert "Features are simulated" in told
    manifest = Grounder.load(output).manifest
    assert manifest.precision == "fp16"
    assert "drn.onnx" in manifest.sources


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_other_precisions_are_in_the_graph_and_in_its_manifest(precision: str, model: Path, planted: Path) -> None:
    output = build_engine(
        model,
        precision=precision,  # type: ignore[arg-type]
        data=planted,
        calib_samples=64,
        calib_method="mse",
        max_drop=LOOSE,
        query_length=(1, 8, 12),
    )
    properties = {entry.key: entry.value for entry in onnx.load(output).metadata_props}
    assert json.loads(properties["drn.manifest"])["precision"] == precision


@pytest.mark.rtx
def test_an_engine_is_built_ahead_of_time_with_a_sidecar_that_vouches_for_it(model: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    output = build_engine(
        model, precision="fp16", target="tensorrt-rtx", compute_capability=("8.6",), query_length=(1, 8, 12)
    )
    assert output.name == "drn.fp16.engine"
    sidecar = read_sidecar(output)
    assert sidecar.manifest.precision == "fp16"
    assert sidecar.content["compute_capabilities"] == ["8.6"]
    assert len(sidecar.content["profiles"]) == 2
    assert set(sidecar.content["sha256"]) == {"drn.fp16.engine", "drn.fp16.onnx"}


def test_a_dry_run_says_what_would_be_built_and_writes_nothing(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_engine(model, precision="fp16", dry_run=True, query_length=(1, 8, 12))
    told = capsys.readouterr().out
    assert "drn.fp16.onnx" in told
    assert "several queries" in told
    assert [path.name for path in model.parent.iterdir()] == ["drn.onnx"]


def test_a_broken_promise_is_not_called_a_success(model: Path, planted: Path) -> None:
    with pytest.raises(PromiseBroken, match="int8 was asked for"):
        build_engine(
            model, precision="int8", data=planted, keep=("prop_fc", "fpn", "backbone_net"), calib_samples=64,
            calib_method="minmax", query_length=(1, 8, 12),
        )  # fmt: skip
    assert not model.with_name("drn.int8.onnx").exists()


def test_what_does_not_go_together_is_refused_before_any_work(model: Path, tmp_path: Path) -> None:
    with pytest.raises(GroundingError, match="needs ranges"):
        build_engine(model, precision="int8")
    with pytest.raises(GroundingError, match="are for int8 and fp8"):
        build_engine(model, precision="fp16", table=tmp_path / "t.json")
    with pytest.raises(GroundingError, match="there is none"):
        build_engine(model, precision="fp32", keep=("fpn",), output=tmp_path / "o.onnx")
    with pytest.raises(OutputError, match=r"should end in \.onnx"):
        build_engine(model, output=tmp_path / "drn.engine", target="onnxruntime")
    with pytest.raises(OutputError, match="overwritten"):
        build_engine(model, output=model)
    with pytest.raises(ModelFileError, match="does not exist"):
        build_engine(tmp_path / "absent.onnx")
    with pytest.raises(ShapeError, match="--batch takes MIN OPT MAX"):
        build_engine(model, batch=(4, 2, 1), dry_run=True)


def test_a_graph_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.onnx").write_bytes(b"not a graph")
    with pytest.raises(ModelFileError):
        build_engine(tmp_path / "other.onnx")


def test_the_target_is_chosen_with_a_reason() -> None:
    if cuda_devices():
        pytest.skip("this machine has a GPU")
    chosen, why = choose_target("auto")
    assert chosen == "onnxruntime"
    assert "no engine can be built here" in why
    with pytest.raises(DeviceError):
        choose_target("tensorrt")
