"""Test `export.parity.compare_plans`: each plan of an engine is compared, even without routed queries."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from benchmarks.fake_tensorrt import Driver, Library, write_plan
from calib.graph.onnx_graph import read_manifest
from calib.graph.unroll_lstm import unroll_lstm
from export.build.build_config import BuildRequest
from export.build.parity_check import ParityChecker
from export.build.run_build import _check_engine
from export.engine.profiles import profiles, with_fixed_query_length
from export.parity.compare import compare
from export.parity.model_file import ModelFile
from export.parity.parity_report import ParityReport
from export.parity.parity_result import AccuracyBudget
from export.parity.run_parity import run_parity_check
from runtime import Grounder
from runtime.artifacts.engine_layers import CONTRADICTED, NOT_PROVEN, PROVEN, layers_path
from runtime.artifacts.engine_metadata import read_sidecar
from runtime.backends.cuda_driver import Cuda
from runtime.backends.tensorrt_backend import open_engine, short_query_plans
from runtime.core.errors import CheckFailed, ShapeError
from runtime.core.io.digests import sha256
from runtime.datasets.dataset import Annotation, DataSet
from tests.export.conftest import with_changed_weights
from tests.raising import raises

LONGEST = 12


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, its queries, and a directory for its engine."""

    model: Path
    directory: Path
    data_set: DataSet
    annotations: Sequence[Annotation]

    def lengths(self) -> list[int]:
        """Return the number of tokens of each query."""
        vocabulary = Grounder.load(self.model).manifest.vocabulary
        return [len(vocabulary.encode(one.sentence, Counter())) for one in self.annotations]

    def engine(self, steps: Sequence[int], wrong: Sequence[int] = ()) -> Path:
        """Write an engine with further plans for short queries.

        Args:
            steps: maximum numbers of tokens of the further plans; 0 is the plan for all queries.
            wrong: plans whose answers are wrong.
        """
        engine = self.directory / "drn.fp32.engine"
        graph = onnx.load(self.model)
        manifest = read_manifest(graph)
        shapes = profiles((1, 4, 8), (1, 8, LONGEST), manifest)
        content: dict[str, Any] = {}
        for tokens in (*steps, 0):
            written = unroll_lstm(graph, tokens) if tokens else graph
            if tokens in wrong:
                written = with_changed_weights(
                    written, np.negative, "fcos.head.iou_scores.1.weight", "fcos.head.scales"
                )
            path = self.directory / f"plan.{tokens}.onnx"
            onnx.save(written, path)
            built = [with_fixed_query_length(profile, tokens) for profile in shapes] if tokens else shapes
            plan = engine.with_name(f"drn.fp32.{tokens}.engine") if tokens else engine
            about = [dataclasses.asdict(profile) for profile in built]
            others = {"unrolled": content} if content and not tokens else {}
            write_plan(plan, path, about, manifest, **others)
            content[plan.name] = sha256(plan)
        return engine

    def open(self, engine: Path) -> Grounder:
        driver = Driver()
        return Grounder(open_engine(engine, library=Library(driver, "10.16.1.11"), cuda=Cuda(driver)))

    def proof(self, engine: Path) -> ParityReport:
        sides = [Grounder.load(self.model, "cpu", 1), self.open(engine)]
        files = [ModelFile.of(path, side.manifest) for path, side in zip((self.model, engine), sides, strict=True)]
        return run_parity_check(
            sides, files, self.data_set, self.annotations, AccuracyBudget(), split="test", command="command"
        )


@pytest.fixture
def case(models: Path, planted: Path, tmp_path: Path) -> Case:
    data_set = DataSet(planted)
    return Case(models / "drn.onnx", tmp_path, data_set, data_set.annotations("test"))


def test_engines_with_equal_answers_are_proven(case: Case) -> None:
    lengths = sorted(case.lengths())
    usual, longest = lengths[len(lengths) // 2], lengths[-1]
    proof = case.proof(case.engine((usual, longest)))
    assert not proof.violations
    checks = proof.to_dict()["plans"]
    assert [check["name"] for check in checks] == [
        *(f"drn.fp32.{tokens}.engine" for tokens in (usual, longest)), "drn.fp32.engine",
    ]  # fmt: skip
    # Every query runs once in the engine, and once in each plan that accepts it.
    assert sum(check["answered"] for check in checks) == len(lengths)
    assert [check["checked"] for check in checks] == [
        sum(length <= usual for length in lengths), len(lengths), len(lengths),
    ]  # fmt: skip
    # The longest query of a batch selects its plan.
    assert checks[-2]["answered"] > checks[-1]["answered"] == 0
    assert {check["verdict"] for check in checks} == {PROVEN}
    assert json.loads(json.dumps(checks)) == checks
    lines = [line for line in proof.text().splitlines() if " <= " in line]
    for check, line in zip(checks, lines, strict=True):
        assert line.startswith(check["name"])
        assert f" {check['answered']} " in line
        assert f" {check['checked']} " in line


@pytest.mark.parametrize("wrong", ["loop", "short"])
def test_wrong_engine_breaks_parity_without_own_queries(case: Case, wrong: str) -> None:
    longest = max(case.lengths())
    engine = case.engine((longest,), wrong=(0,) if wrong == "loop" else (longest,))
    proof = case.proof(engine)
    name = engine.name if wrong == "loop" else f"drn.fp32.{longest}.engine"
    assert any(clause.startswith(name) for clause in proof.violations)
    verdicts = {check["name"]: check["verdict"] for check in proof.to_dict()["plans"]}
    assert verdicts.pop(name) == CONTRADICTED
    assert set(verdicts.values()) == {PROVEN}


def test_engine_without_queries_is_not_proven(case: Case, caplog: pytest.LogCaptureFixture) -> None:
    shortest = min(case.lengths())
    assert shortest > 1
    proof = case.proof(case.engine((1,), wrong=(1,)))
    assert not proof.violations
    short, loop = proof.to_dict()["plans"]
    assert (short["checked"], short["answered"], short["verdict"]) == (0, 0, NOT_PROVEN)
    assert loop["verdict"] == PROVEN
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "drn.fp32.1.engine" in warning.getMessage()
    assert NOT_PROVEN in proof.text()


def test_single_engine_is_checked_once(case: Case) -> None:
    (check,) = case.proof(case.engine(())).to_dict()["plans"]
    assert check["answered"] == check["checked"] == len(case.annotations)
    assert check["verdict"] == PROVEN


def test_graph_models_list_no_engines(case: Case) -> None:
    sides = [Grounder.load(case.model, "cpu", 1) for _ in range(2)]
    assert compare(*sides, case.data_set, case.annotations[:2]).to_dict()["plans"] == []


def test_engine_losses_count_as_share_of_all_queries(case: Case) -> None:
    lengths = sorted(case.lengths())
    short = lengths[0]
    proof = case.proof(case.engine((short,), wrong=(short,)))
    check = proof.parity.plans[0]
    assert check.parity is not None
    share = check.checked / len(lengths)
    lost = max(-100 * share * check.parity.differences[name].mean for name in ("R@1 IoU=0.7", "mIoU"))
    assert share < 1
    loose = AccuracyBudget(max_drop=max(lost, 0.0) + 1e-6, boundary_p99=None)
    assert check.verdict(len(lengths), loose)[0] == PROVEN


def test_engines_that_fail_the_check_are_renamed_together(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    longest = max(case.lengths())
    engine = case.engine((longest,), wrong=(0,))
    short = engine.with_name(f"drn.fp32.{longest}.engine")
    layers_path(short).write_bytes(b"layers")
    graph = onnx.load(case.model)
    monkeypatch.setattr(Grounder, "load", lambda path, *_: case.open(path))
    job: Any = SimpleNamespace(output=engine, precision="fp32", sibling_path=lambda name: case.directory / name)
    request = BuildRequest(case.model, precision="fp32", threads=1)
    checker = ParityChecker(request, job, engine, "command", case.model, graph, case.data_set, case.annotations)
    made: Any = SimpleNamespace(manifest=read_manifest(graph))
    reports: list[ParityReport] = []
    monkeypatch.setattr(ParityChecker, "write_reports", lambda self, report, *_: reports.append(report))
    with raises(CheckFailed, "parity_failed", "--optimization-level"):
        _check_engine(checker, made, [short, engine])
    names = ("drn.fp32.rejected.engine", f"drn.fp32.{longest}.rejected.engine")
    assert {path.name for path in case.directory.glob("*.engine*")} == {*names, *(f"{name}.json" for name in names)}
    rejected, other = (case.directory / name for name in names)
    assert reports[0].model.path == rejected
    assert "plan.0.onnx" in read_sidecar(rejected).content["sha256"]
    assert layers_path(other).read_bytes() == b"layers"
    # They can be opened together.
    assert [path for path, _ in short_query_plans(rejected, read_sidecar(rejected))] == [other]


def test_only_limits_queries_to_one_engine(case: Case) -> None:
    short, longest = min(case.lengths()), max(case.lengths())
    model = case.open(case.engine((short,)))
    backend: Any = model.backend
    with backend.only(f"drn.fp32.{short}.engine"), raises(ShapeError, "query_length_out_of_range", longest):
        backend.network_for(longest)
    assert backend.network_for(longest).path.name == "drn.fp32.engine"
    with backend.only("drn.fp32.engine"):
        assert backend.network_for(short).path.name == "drn.fp32.engine"
