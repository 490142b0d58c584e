"""Serialize a converted graph with its manifest, and split it into the parts that engines are built from."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from calib.graph.conv_padding import extract_padding, inline_padding
from calib.graph.onnx_graph import manifest_in, read_manifest
from calib.graph.precision_audit import PrecisionStats, audit_graph
from calib.graph.split_model import split_graph, write_split_model
from export.build.reduced_precision import ConvertedGraph
from export.engine.engine_part import EnginePart
from export.engine.profiles import Profile, part_profiles
from export.parity.model_file import ModelFile
from runtime.artifacts.manifest import METADATA_KEY, Manifest
from runtime.artifacts.onnx_metadata import with_digest
from runtime.core.cpu_info import cpu
from runtime.core.io.atomic_files import atomic_write
from runtime.core.io.digests import sha256

if TYPE_CHECKING:
    from calib.calibration_table import CalibrationTable
    from export.build.build_config import BuildConfig


def format_shares(stats: PrecisionStats) -> str:
    """Return the share of the multiply-adds in each data type, largest first."""
    kinds = sorted(stats.total(), key=stats.share, reverse=True)
    return ", ".join(f"{100 * stats.share(kind):.1f} % {kind}" for kind in kinds) + " of the multiply-adds"


@dataclasses.dataclass(frozen=True)
class ConvertedModel:
    """A converted graph in memory.

    Attributes:
        content: content of the ONNX file.
        manifest: manifest of the converted model.
        precision_stats: data types of the graph.
        fp32_weight_bytes: size of the weights of the FP32 graph.
        calibration: calibration table of the graph; None for floating point.
    """

    content: bytes
    manifest: Manifest
    precision_stats: PrecisionStats
    fp32_weight_bytes: int
    calibration: CalibrationTable | None = None

    @classmethod
    def of(cls, job: BuildConfig, source: Path, graph: onnx.ModelProto, converted: ConvertedGraph) -> ConvertedModel:
        """Measure the data types of a converted graph, and serialize it with manifest and digest.

        Args:
            source, graph: file of the FP32 graph, and the graph.
            converted: the converted graph; its metadata is replaced.
        """
        stats = audit_graph(converted.graph)
        manifest = read_manifest(graph, str(source))
        shares = {kind: round(stats.share(kind), 6) for kind in stats.total()}
        manifest = dataclasses.replace(
            manifest,
            precision=job.precision,
            library=job.library or "onnxruntime",
            sources={**manifest.sources, source.name: sha256(source)},
            training={**manifest.training, "precision": {**converted.facts, "multiply-adds": shares, "cpu": cpu()}},
        )
        del converted.graph.metadata_props[:]
        onnx.helper.set_model_props(converted.graph, {METADATA_KEY: manifest.to_json()})
        weights = sum(audit_graph(graph).weight_bytes.values())
        padded = job.precision == "fp32" and job.library != "openvino"
        stored = extract_padding(converted.graph) if padded else converted.graph
        return cls(with_digest(stored.SerializeToString()), manifest, stats, weights, converted.calibration)

    def file(self, path: Path) -> ModelFile:
        """Describe the file with this content at `path`, which need not exist yet."""
        return ModelFile(path, hashlib.sha256(self.content).hexdigest(), len(self.content), self.manifest)

    def save(self, path: Path) -> None:
        """Write the file."""
        with atomic_write(path) as temporary:
            temporary.write_bytes(self.content)


def split_engine_parts(
    job: BuildConfig, model: ConvertedModel, source: onnx.ModelProto, profiles: Sequence[Profile], videos: int
) -> list[EnginePart]:
    """Split a converted model, write both graphs, and return the sources of the two engines, the query part last.

    Args:
        model: the converted model, which was written to `job.graph_path`.
        source: the FP32 graph.
        profiles: optimization profiles of the full model.
        videos: number of encoded videos that the query engine keeps in GPU memory.
    """
    graph = inline_padding(onnx.load_from_string(model.content))
    sources = {**model.manifest.sources, job.graph_path.name: sha256(job.graph_path)}
    onnx.helper.set_model_props(graph, {METADATA_KEY: dataclasses.replace(model.manifest, sources=sources).to_json()})
    pair = split_graph(graph)
    written = write_split_model(*pair, job.graph_path)
    fp32_pair = split_graph(source)
    encoded = pair[0].graph.output[0].type.tensor_type.shape.dim[1].dim_value
    parts = []
    for index, path in enumerate((written[0], written[-1])):
        manifest = manifest_in(path)
        weights = sum(audit_graph(fp32_pair[index]).weight_bytes.values())
        engine = job.output if index else path.with_suffix(".engine")
        shapes = part_profiles(manifest.part, profiles, manifest, videos, encoded)
        stats = audit_graph(pair[index])
        print(f"{path.name}: {format_shares(stats)}.")
        parts.append(EnginePart(pair[index], manifest, path, sha256(path), engine, shapes, stats, weights))
    return parts
