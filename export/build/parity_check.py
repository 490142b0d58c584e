"""Check the accuracy of converted graphs (on the CPU) and engines (on a GPU) against the FP32 graph."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from calib.graph.half_precision import emulate_bf16
from calib.graph.onnx_graph import read_manifest
from calib.graph.onnx_session import InMemorySplitBackend
from calib.graph.split_model import split_graph
from export.build.artifacts import ConvertedModel
from export.parity.html_report import render_html_report
from export.parity.model_file import ModelFile
from export.parity.parity_report import ParityReport
from export.parity.parity_result import AccuracyBudget
from export.parity.parity_tables import calibration_coverage, engine_precision_table, precision_table
from export.parity.run_parity import engine_precision, run_parity_check
from runtime.artifacts import engine_metadata
from runtime.core.io.atomic_files import write_json, write_text
from runtime.core.terminal import command_line
from runtime.datasets.dataset import Annotation, DataSet
from runtime.grounding.grounder import Grounder

if TYPE_CHECKING:
    from export.build.build_config import BuildConfig, BuildRequest

log = logging.getLogger("drn")


@dataclasses.dataclass(frozen=True)
class ParityChecker:
    """Compares converted graphs and engines with the FP32 graph on the queries of a split.

    Attributes:
        request: options of the build.
        job: files of the build, in the staging directory.
        output_path: final path of the output.
        command: command that reproduces the build.
        source, graph: file of the FP32 graph, and the graph.
        data_set, annotations: the queries; None and empty without --data.
    """

    request: BuildRequest
    job: BuildConfig
    output_path: Path
    command: str
    source: Path
    graph: onnx.ModelProto
    data_set: DataSet | None
    annotations: Sequence[Annotation]

    def check_graph(self, model: ConvertedModel) -> ParityReport:
        """Compare a converted model with the FP32 graph, on the CPU."""
        # ONNX Runtime has no BF16 kernels on a CPU. Fusions of Q/DQ differ from engines, so only the library
        # that will run the graph may apply them.
        graph = emulate_bf16(onnx.load_from_string(model.content))
        optimized = self.job.library is not None or self.job.precision in ("fp32", "fp16", "bf16")
        # Two models at the same time, with half of the cores each, are faster than one after the other.
        threads = max((self.request.threads or os.cpu_count() or 2) // 2, 1)
        concurrent = self.request.threads != 1
        compared = self._open_split(graph, optimized, threads)
        reference = self._open_split(self.graph, True, threads)
        return self._compare(compared, model.file(self.job.graph_path), reference, concurrent)

    def check_engine(self, model: ConvertedModel) -> ParityReport:
        """Compare the engine of a converted model with the FP32 graph, on the GPU."""
        compared = Grounder.load(self.job.output, "cuda")
        reference = self._open_split(self.graph, True, self.request.threads)
        return self._compare(compared, ModelFile.of(self.job.output, model.manifest), reference, False)

    def _open_split(self, graph: onnx.ModelProto, optimized: bool, threads: int | None) -> Grounder:
        """Open a graph in two parts, so that each video is encoded once: equal results in two thirds of the time."""
        return Grounder(InMemorySplitBackend(*split_graph(graph), threads, optimized))

    def _compare(self, compared: Grounder, file: ModelFile, reference: Grounder, concurrent: bool) -> ParityReport:
        assert self.data_set is not None
        log.info("Comparing %s with %s on %d queries ...", file.path.name, self.source.name, len(self.annotations))
        manifest = read_manifest(self.graph, str(self.source))
        return run_parity_check(
            (reference, compared),
            (ModelFile.of(self.source, manifest), file),
            self.data_set,
            self.annotations,
            AccuracyBudget.of(self.job.precision, self.request.max_drop),
            split=self.request.parity_split,
            command=self.command,
            concurrent=concurrent,
        )

    def write_reports(
        self, report: ParityReport, model: ConvertedModel, engine: ModelFile | None, engines: Sequence[Path] = ()
    ) -> None:
        """Write the JSON and the HTML report, for a rejected model with `rejected` in their names.

        Args:
            report: result of the last check.
            engine: engine of the model; None for the graph only.
        """
        stats = precision_table(model.precision_stats)
        if engine:
            report = dataclasses.replace(report, engine_precision=engine_precision(*(engines or (engine.path,))))
            engine_table = engine_precision_table(engine_metadata.read_sidecar(engine.path).content["census"])
            if engine_table:
                stats = dataclasses.replace(stats, notes=(*stats.notes, *engine_table.notes))
            if report.model.path == engine.path:
                engine = None
        rejected = "rejected." if report.violations else ""
        subject = self.output_path.with_name(report.model.path.name if report.violations else self.output_path.name)
        commands = (self.command, command_line("runtime.describe", {}, subject))
        output, html = (self.job.sibling_path(f"{rejected}{ending}") for ending in ("parity.json", "passport.html"))
        calibration = calibration_coverage(model.calibration) if model.calibration else None
        write_json(output, report.to_dict())
        write_text(html, render_html_report(report, stats, engine=engine, commands=commands, calibration=calibration))
