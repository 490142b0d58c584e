"""Describe the source of one engine: graph, profiles and paths."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import onnx

from calib.graph.precision_audit import PrecisionStats
from calib.graph.unroll_lstm import unroll_lstm
from export.engine.profiles import Profile, with_fixed_query_length
from runtime.artifacts.extractor_manifest import ExtractorManifest
from runtime.artifacts.manifest import Manifest


@dataclasses.dataclass(frozen=True)
class EnginePart:
    """The source of one engine: the full model, or one of the two parts of a split model.

    Attributes:
        graph: graph in the requested precision.
        manifest: manifest of the model, or of the part.
        graph_path: ONNX file of the graph.
        graph_sha256: SHA-256 of that file.
        engine: path of the plan.
        profiles: optimization profiles.
        precision_stats: data types of the graph.
        fp32_weight_bytes: size of the weights in FP32.
        unrolled: parts for short queries, with an unrolled LSTM.
        optional: whether a build continues if this part cannot be built.
    """

    graph: onnx.ModelProto
    manifest: Manifest | ExtractorManifest
    graph_path: Path
    graph_sha256: str
    engine: Path
    profiles: Sequence[Profile]
    precision_stats: PrecisionStats
    fp32_weight_bytes: int
    unrolled: tuple[EnginePart, ...] = ()
    optional: bool = False

    @property
    def engines(self) -> list[Path]:
        """The engines for short queries, and the engine for all queries last."""
        return [*(other.engine for other in self.unrolled), self.engine]

    @property
    def max_query_length(self) -> int:
        """Number of tokens of the longest query."""
        return max(profile.query_length.max for profile in self.profiles)

    def with_unrolled(self, steps: Sequence[int], optional: bool = False) -> EnginePart:
        """Return this part with a part for short queries for each number of tokens; unchanged if it reads no tokens.

        A build continues without the new parts if they are `optional`.
        """
        if not steps or self.manifest.part not in ("whole", "query"):
            return self
        unrolled = tuple(
            dataclasses.replace(
                self,
                graph=unroll_lstm(self.graph, count),
                engine=short_query_engine_path(self.engine, count),
                profiles=[with_fixed_query_length(profile, count) for profile in self.profiles],
                optional=optional,
            )
            for count in steps
        )
        return dataclasses.replace(self, unrolled=unrolled)


def short_query_engine_path(engine: Path, steps: int) -> Path:
    """Return the path of the engine for queries of at most `steps` tokens, as drn.fp16.8.engine for drn.fp16.engine."""
    return engine.with_name(f"{engine.stem}.{steps}{engine.suffix}")
