"""Twins that have the precision they are called by, whole and in parts: what is written to disk, and built of."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from calib.graph.conv_padding import padding_apart, padding_inside
from calib.graph.source_graph import manifest_in
from calib.graph.split_model import split_graph, write_pair
from export.build.reduced_precision import Twin
from export.engine.engine_part import Part
from export.engine.profiles import Profile, part_profiles
from runtime.artifacts.manifest import METADATA_KEY, Manifest
from runtime.artifacts.onnx_metadata import sealed
from runtime.core.cpu_info import cpu
from runtime.core.io.files import replace_when_whole, sha256

if TYPE_CHECKING:
    import onnx

    from calib.graph.precision_audit import Census
    from export.build.build_config import Job
    from export.parity.model_file import ModelFile


def counted_text(counted: Census) -> str:
    """Return what most is computed in, for a terminal."""
    shares = sorted(counted.total(), key=lambda kind: -counted.share(kind))
    return ", ".join(f"{100 * counted.share(kind):.1f} % {kind}" for kind in shares) + " of the multiply-adds"


@dataclasses.dataclass(frozen=True)
class Made:
    """A twin that has the precision it is called by, not yet on disk.

    Attributes:
        content: the file's bytes.
        manifest: what it says of itself.
        census: what was counted in it.
        fp32_weight_bytes: size of the source's weights.
    """

    content: bytes
    manifest: Manifest
    census: Census
    fp32_weight_bytes: int

    @classmethod
    def of(cls, job: Job, source: Path, graph: onnx.ModelProto, twin: Twin) -> Made:
        """Count what the twin of an FP32 graph is computed in, and seal it."""
        from onnx.helper import set_model_props

        from calib.graph.onnx_graph import manifest_of
        from calib.graph.precision_audit import census

        counted = census(twin.graph)
        manifest = manifest_of(graph, str(source))
        shares = {kind: round(counted.share(kind), 6) for kind in counted.total()}
        about = dataclasses.replace(
            manifest,
            precision=job.precision,
            sources={**manifest.sources, source.name: sha256(source)},
            training={**manifest.training, "precision": {**twin.facts, "multiply-adds": shares, "cpu": cpu()}},
        )
        del twin.graph.metadata_props[:]
        set_model_props(twin.graph, {METADATA_KEY: about.to_json()})
        weights = sum(census(graph).weight_bytes.values())
        written = padding_apart(twin.graph) if job.precision == "fp32" else twin.graph
        return cls(sealed(written.SerializeToString()), about, counted, weights)

    def file(self, path: Path) -> ModelFile:
        """Return the file that these bytes are, or will be."""
        from export.parity.model_file import ModelFile

        return ModelFile(path, hashlib.sha256(self.content).hexdigest(), len(self.content), self.manifest)

    def save(self, path: Path) -> Path:
        with replace_when_whole(path) as temporary:
            temporary.write_bytes(self.content)
        return path


def whole_part(job: Job, made: Made, twin: Twin, shapes: Sequence[Profile]) -> Part:
    """Return what the engine of a whole model is built of."""
    digest = made.file(job.twin).sha256
    return Part(twin.graph, made.manifest, job.twin, digest, job.output, shapes, made.census, made.fp32_weight_bytes)


def cut_parts(job: Job, made: Made, source: onnx.ModelProto, shapes: Sequence[Profile], videos: int) -> list[Part]:
    """Write the pair that a proven twin is cut into, and return its parts, the query part last."""
    import onnx

    from calib.graph.precision_audit import census

    proven = padding_inside(onnx.load_from_string(made.content))
    whole = dataclasses.replace(made.manifest, sources={**made.manifest.sources, job.twin.name: sha256(job.twin)})
    onnx.helper.set_model_props(proven, {METADATA_KEY: whole.to_json()})
    pair = split_graph(proven)
    written = write_pair(*pair, job.twin)
    wide = split_graph(source)
    encoded = pair[0].graph.output[0].type.tensor_type.shape.dim[1].dim_value
    parts = []
    for index, path in enumerate((written[0], written[-1])):
        manifest = manifest_in(path)
        weights = sum(census(wide[index]).weight_bytes.values())
        engine = job.output if index else path.with_suffix(".engine")
        built_for = part_profiles(manifest.part, shapes, manifest, videos, encoded)
        counted, digest = census(pair[index]), sha256(path)
        part = Part(pair[index], manifest, path, digest, engine, built_for, counted, weights)
        print(f"{path.name}: {counted_text(part.census)}.")
        parts.append(part)
    return parts
