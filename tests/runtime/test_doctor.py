"""Test `python -m runtime.doctor`: findings and remedies."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runtime import doctor as module
from runtime.backends import exact_int8
from runtime.core.errors import DeviceError
from runtime.core.gpu_info import Gpu
from runtime.doctor import doctor
from tests.raising import quotes


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The installed distributions, empty at first; torch is not started, and there is no nvidia-smi."""
    versions: dict[str, str] = {}
    monkeypatch.setattr(module, "installed_version", versions.get)
    monkeypatch.setattr("runtime.core.gpu_info.shutil.which", lambda name: None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "openvino", None)
    answer = subprocess.CompletedProcess([], 0, "False None\n", "")
    monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: answer)
    return versions


def findings() -> dict[str, module.Finding]:
    return {finding.subject: finding for finding in doctor()}


def test_doctor_names_missing_packages(installed: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    actual = findings()
    remedies = {
        "run .onnx models": "pip install '.[cpu]'",
        "run .onnx models for OpenVINO": "pip install '.[openvino]'",
        "train, run .pt models": "pip install '.[train]'",
        "export to ONNX": "pip install '.[export]'",
        "TensorRT": "pip install tensorrt",
        "TensorRT-RTX": "pip install '.[rtx]'",
        "plots": "pip install '.[plot]'",
        "read video files": "pip install '.[video]'",
        "read HDF5 features": "pip install '.[hdf5]'",
        "quantize, build engines": "pip install '.[engine]'",
        "serve over HTTP": "pip install '.[serve]'",
        "ground a corpus": "pip install '.[corpus]'",
        "query a Triton server": "pip install '.[triton]'",
    }
    for subject, remedy in remedies.items():
        assert not actual[subject].works
        assert actual[subject].remedy.startswith(remedy)
    assert not actual["NVIDIA GPU"].works
    assert actual["this machine"].works
    out = capsys.readouterr().out
    assert all(remedy in out for remedy in remedies.values())
    assert [line[:3] for line in out.splitlines() if "->" not in line].count("no ") == len(remedies) + 1


def test_doctor_reports_working_packages(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    names = (
        *("onnx", "onnxscript", "onnxruntime", "openvino", "matplotlib", "h5py", "tensorrt", "tensorrt-rtx-cu13"),
        *("polygraphy", "jinja2", "ray", "pyarrow", "tritonclient"),
        *("fastapi", "uvicorn", "h11", "python-multipart", "prometheus-client"),
    )
    installed.update(dict.fromkeys(names, "1"))
    installed.update({"torch": "2.13.0", "av": pytest.importorskip("av").__version__})
    monkeypatch.delitem(sys.modules, "onnxruntime")
    pytest.importorskip("onnxruntime")
    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(__version__="2026.4.1"))
    actual = findings()
    assert all(actual[subject].works for subject in actual if subject not in ("NVIDIA GPU", "TensorRT"))
    assert actual["train, run .pt models"].details == "torch 2.13.0, CPU only"
    assert "CPU" in actual["run .onnx models"].details
    assert quotes(actual["run .onnx models for OpenVINO"].details, "2026.4.1")


@pytest.mark.parametrize("gpu", [True, False])
def test_tensorrt_works_only_with_a_gpu(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch, gpu: bool) -> None:
    def cuda() -> Any:
        if not gpu:
            raise DeviceError("There is no CUDA driver here; install it.")
        return SimpleNamespace(name="NVIDIA H100", capability="9.0", driver="13.0")

    installed["tensorrt"] = "11.4"
    monkeypatch.setattr("runtime.backends.cuda_driver.Cuda", cuda)
    finding = findings()["TensorRT"]
    assert finding.works is gpu
    assert finding.details.startswith("tensorrt 11.4")
    assert ("NVIDIA H100 (9.0), CUDA 13.0" in finding.details) is gpu
    assert ("no CUDA driver" in finding.remedy) is not gpu


@pytest.mark.parametrize(
    ("features", "cpu", "int8"),
    [
        (("avx2",), "avx2", "with uint8 weights"),
        (("avx2", "avx512_vnni"), "avx512_vnni", "with int8 weights"),
        (None, "features unknown", "with uint8 weights"),
    ],
)
def test_cpu_findings_show_features_and_int8_weight_form(
    installed: dict[str, str], monkeypatch: pytest.MonkeyPatch, features: tuple[str, ...] | None, cpu: str, int8: str
) -> None:
    for owner in (module.cpu_info, exact_int8):
        monkeypatch.setattr(owner, "cpu_features", lambda: features)
    monkeypatch.setattr(exact_int8.platform, "machine", lambda: "x86_64")
    actual = findings()
    assert cpu in actual["CPU"].details
    assert actual["INT8 on this CPU"].works
    assert int8 in actual["INT8 on this CPU"].details


def test_incomplete_or_conflicting_packages_fail(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    installed.update({"ray": "2.51", "onnxruntime": "1", "onnxruntime-gpu": "1", "torch": "2.13.0"})
    answer = subprocess.CompletedProcess([], 1, "", "Traceback\nImportError: libcudart.so\n")
    monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: answer)
    actual = findings()
    corpus, onnx, train = (actual[name] for name in ("ground a corpus", "run .onnx models", "train, run .pt models"))
    assert [finding.works for finding in (corpus, onnx, train)] == [False] * 3
    assert quotes(corpus.details, "pyarrow")
    assert not quotes(corpus.details, "ray")
    assert quotes(onnx.details, "onnxruntime", "onnxruntime-gpu")
    assert onnx.remedy.startswith("pip uninstall")
    assert train.details.endswith("ImportError: libcudart.so")


def test_broken_openvino_is_shown(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installed["openvino"] = "2026.4"
    (tmp_path / "openvino.py").write_text("raise ImportError('libopenvino.so: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "openvino")
    finding = findings()["run .onnx models for OpenVINO"]
    assert not finding.works
    assert quotes(finding.details, "libopenvino.so")
    assert quotes(finding.remedy, "'.[openvino]'")


def test_doctor_lists_every_gpu(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch, run_command: Any) -> None:
    gpus = [Gpu("NVIDIA H100", "550.1", total_mib=81559, capability="9.0"), Gpu("NVIDIA T4")]
    monkeypatch.setattr(module, "list_gpus", lambda: gpus)
    shown = [finding.details for finding in doctor() if finding.subject == "NVIDIA GPU" and finding.works]
    assert shown == ["NVIDIA H100, 550.1, 81559 MiB, 9.0", "NVIDIA T4"]
    run_command(doctor)
