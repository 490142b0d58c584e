"""Check the accuracy of built models against the FP32 graph: converted graphs on the CPU, engines on a GPU."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from calib.graph.onnx_graph import read_manifest
from export.build.artifacts import ConvertedModel
from runtime.artifacts import engine_metadata
from runtime.core.terminal import command_line
from runtime.datasets.dataset import Annotation, DataSet

if TYPE_CHECKING:
    import onnx

    from export.build.build_config import BuildConfig, BuildRequest
    from export.parity.model_file import ModelFile
    from export.parity.parity_report import ParityReport
    from runtime.grounding.grounder import Grounder

log = logging.getLogger("drn")


@dataclasses.dataclass(frozen=True)
class ParityChecker:
    """Compares converted graphs and engines with the FP32 graph on the queries of a split.

    Attributes:
        request: the options of the build.
        job: its files, in the staging directory.
        output_path: final path of what is built.
        command: that builds the same again.
        source, graph: the FP32 graph and its file.
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

    def check_graph(self, created: ConvertedModel) -> ParityReport:
        """Compare the converted graph, as it will be on disk, with the FP32 graph, on the CPU."""
        import onnx

        from calib.graph.half_precision import emulate_bf16

        # ONNX Runtime has no BF16 kernels on a CPU. Its own fusions of Q/DQ compute something else than engines do, so
        # they are in only where ONNX Runtime is what will answer.
        graph = emulate_bf16(onnx.load_from_string(created.content))
        optimized = self.job.target == "onnxruntime" or self.job.precision in ("fp32", "fp16", "bf16")
        # One core for each of the two serves better than all cores for one after the other.
        threads = max((self.request.threads or os.cpu_count() or 2) // 2, 1)
        concurrent = self.request.threads != 1
        compared, reference = (
            self._split_in_memory(graph, optimized, threads),
            self._split_in_memory(self.graph, True, threads),
        )
        return self._compare(compared, created.file(self.job.graph_path), reference, concurrent)

    def check_engine(self, created: ConvertedModel) -> ParityReport:
        """Compare the engine with the FP32 graph, on the GPU."""
        from export.parity.model_file import ModelFile
        from runtime.grounding.grounder import Grounder

        compared = Grounder.load(self.job.output, "cuda")
        reference = self._split_in_memory(self.graph, True, self.request.threads)
        return self._compare(compared, ModelFile.of(self.job.output, created.manifest), reference, False)

    def _split_in_memory(self, graph: onnx.ModelProto, optimized: bool, threads: int | None) -> Grounder:
        """Return a graph in memory, split so that each video is encoded once: the same numbers in two thirds of the
        time."""
        from calib.graph.onnx_session import InMemorySplitBackend
        from calib.graph.split_model import split_graph
        from runtime.grounding.grounder import Grounder

        return Grounder(InMemorySplitBackend(*split_graph(graph), threads, optimized))

    def _compare(self, compared: Grounder, file: ModelFile, reference: Grounder, concurrent: bool) -> ParityReport:
        from export.parity.model_file import ModelFile
        from export.parity.parity_result import AccuracyBudget
        from export.parity.run_parity import run_parity_check

        assert self.data_set is not None
        log.info("Asking %s and %s %d queries ...", self.source.name, file.path.name, len(self.annotations))
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
        self, proof: ParityReport, created: ConvertedModel, engine: ModelFile | None, engines: Sequence[Path] = ()
    ) -> None:
        """Write the JSON and the HTML report; of a rejected model, under the name of rejected files.

        Args:
            proof: the report.
            created: the converted graph.
            engine: that was built; None for the graph alone.
            engines: every engine that was built with it.
        """
        from export.parity.parity_tables import engine_precision_table, precision_table
        from export.parity.run_parity import engine_precision, write_reports

        stats = precision_table(created.precision_stats)
        if engine:
            proof = dataclasses.replace(proof, engine_precision=engine_precision(*(engines or (engine.path,))))
            engine_table = engine_precision_table(engine_metadata.read_sidecar(engine.path).content["census"])
            if engine_table:
                stats = dataclasses.replace(stats, notes=(*stats.notes, *engine_table.notes))
            if proof.model.path == engine.path:
                engine = None
        rejected = "rejected." if proof.broken else ""
        subject = self.output_path.with_name(proof.model.path.name if proof.broken else self.output_path.name)
        commands = (self.command, command_line("runtime.describe", {}, subject))
        output, html = (self.job.sibling_path(f"{rejected}{ending}") for ending in ("parity.json", "passport.html"))
        write_reports(proof, output, html, stats, engine, commands)
