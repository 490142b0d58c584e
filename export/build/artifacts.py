"""Twins that have the precision they are called by, whole and in parts: what is written to disk, and built of."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from calib.graph.conv_padding import extract_padding, inline_padding
from calib.graph.onnx_graph import manifest_in
from calib.graph.split_model import split_graph, write_split_model
from export.build.reduced_precision import ConvertedGraph
from export.engine.engine_part import EnginePart
from export.engine.profiles import Profile, part_profiles
from runtime.artifacts.manifest import METADATA_KEY, Manifest
from runtime.artifacts.onnx_metadata import with_digest
from runtime.core.cpu_info import cpu
from runtime.core.io.atomic_files import atomic_write
from runtime.core.io.digests import sha256

if TYPE_CHECKING:
    import onnx

    from calib.graph.precision_audit import PrecisionStats
    from export.build.build_config import BuildConfig
    from export.parity.model_file import ModelFile


def format_shares(counted: PrecisionStats) -> str:
    """Return what most is computed in, for a terminal."""
    shares = sorted(counted.total(), key=lambda kind: -counted.share(kind))
    return ", ".join(f"{100 * counted.share(kind):.1f} % {kind}" for kind in shares) + " of the multiply-adds"


@dataclasses.dataclass(frozen=True)
class ConvertedModel:
    """A converted graph whose precision was counted, not yet on disk.

    Attributes:
        content: the file's bytes.
        manifest: what it says of itself.
        precision_stats: what was counted in it.
        fp32_weight_bytes: size of the source's weights.
    """

    content: bytes
    manifest: Manifest
    precision_stats: PrecisionStats
    fp32_weight_bytes: int

    @classmethod
    def of(cls, job: BuildConfig, source: Path, graph: onnx.ModelProto, converted: ConvertedGraph) -> ConvertedModel:
        """Count the precision of a converted graph, and serialize it with its manifest and digest."""
        from onnx.helper import set_model_props

        from calib.graph.onnx_graph import read_manifest
        from calib.graph.precision_audit import audit_graph

        counted = audit_graph(converted.graph)
        manifest = read_manifest(graph, str(source))
        shares = {kind: round(counted.share(kind), 6) for kind in counted.total()}
        about = dataclasses.replace(
            manifest,
            precision=job.precision,
            sources={**manifest.sources, source.name: sha256(source)},
            training={**manifest.training, "precision": {**converted.facts, "multiply-adds": shares, "cpu": cpu()}},
        )
        del converted.graph.metadata_props[:]
        set_model_props(converted.graph, {METADATA_KEY: about.to_json()})
        weights = sum(audit_graph(graph).weight_bytes.values())
        written = extract_padding(converted.graph) if job.precision == "fp32" else converted.graph
        return cls(with_digest(written.SerializeToString()), about, counted, weights)

    def file(self, path: Path) -> ModelFile:
        """Return the file that these bytes are, or will be."""
        from export.parity.model_file import ModelFile

        return ModelFile(path, hashlib.sha256(self.content).hexdigest(), len(self.content), self.manifest)

    def save(self, path: Path) -> Path:
        with atomic_write(path) as temporary:
            temporary.write_bytes(self.content)
        return path


def single_engine_part(
    job: BuildConfig, created: ConvertedModel, converted: ConvertedGraph, shapes: Sequence[Profile]
) -> EnginePart:
    """Return what the engine of a whole model is built of."""
    digest = created.file(job.graph_path).sha256
    return EnginePart(
        converted.graph,
        created.manifest,
        job.graph_path,
        digest,
        job.output,
        shapes,
        created.precision_stats,
        created.fp32_weight_bytes,
    )


def cut_parts(
    job: BuildConfig, created: ConvertedModel, source: onnx.ModelProto, shapes: Sequence[Profile], videos: int
) -> list[EnginePart]:
    """Split a checked graph, write both parts, and return them, the query part last."""
    import onnx

    from calib.graph.precision_audit import audit_graph

    proven = inline_padding(onnx.load_from_string(created.content))
    whole = dataclasses.replace(
        created.manifest, sources={**created.manifest.sources, job.graph_path.name: sha256(job.graph_path)}
    )
    onnx.helper.set_model_props(proven, {METADATA_KEY: whole.to_json()})
    pair = split_graph(proven)
    written = write_split_model(*pair, job.graph_path)
    wide = split_graph(source)
    encoded = pair[0].graph.output[0].type.tensor_type.shape.dim[1].dim_value
    parts = []
    for index, path in enumerate((written[0], written[-1])):
        manifest = manifest_in(path)
        weights = sum(audit_graph(wide[index]).weight_bytes.values())
        engine = job.output if index else path.with_suffix(".engine")
        built_for = part_profiles(manifest.part, shapes, manifest, videos, encoded)
        counted, digest = audit_graph(pair[index]), sha256(path)
        part = EnginePart(pair[index], manifest, path, digest, engine, built_for, counted, weights)
        print(f"{path.name}: {format_shares(part.precision_stats)}.")
        parts.append(part)
    return parts
