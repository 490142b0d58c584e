"""Double builds of TensorRT 11.4, so that `export.build_engine` writes engines on a machine without it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import onnx
import pytest

from export.engine.builder import BuildOptions, BuiltEngine
from runtime.artifacts.engine_layers import Inspection, ProfileView
from tests.export.engine.builder_double import stand_in
from tests.export.engine.inspector_doubles import document


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One call of the builder."""

    graph: onnx.ModelProto
    options: BuildOptions
    timing_cache: bytes | None

    @property
    def tokens(self) -> int | None:
        """Return the query length of the graph: 0 for any, None for a video part."""
        sizes = {value.name: value.type.tensor_type.shape.dim for value in self.graph.graph.input}
        return sizes["query_tokens"][1].dim_value if "query_tokens" in sizes else None


def inspected(scenario: str, version: str = "11.4") -> Inspection:
    """Return the output of the inspector for an engine with two profiles; see `inspector_doubles.SCENARIOS`."""
    views = (ProfileView(name, {}, document(version, scenario, bound=True)) for name in ("one query", "several"))
    return Inspection(document(version, scenario, bound=False), tuple(views))


class EngineBuilds:
    """Builds any graph, and records the calls.

    Attributes:
        attempts: all calls, in order.
        scenarios: what the next engines look like, in the words of `inspector_doubles`; the last is for all others.
        before: called with each attempt and may raise an error, or do nothing.
        plan: content of the next plans.
    """

    def __init__(self) -> None:
        self.attempts: list[Attempt] = []
        self.scenarios = ["convolutions"]
        self.before: Callable[[Attempt], object] = lambda attempt: None
        self.plan = b"plan"

    @property
    def tokens(self) -> list[int | None]:
        return [attempt.tokens for attempt in self.attempts]

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Take the place of TensorRT on a machine without a GPU to run the engines."""
        versions = {"tensorrt": "11.4.0", "tensorrt-rtx": "1.7.1"}
        monkeypatch.setattr("export.engine.builder.load_library", lambda target: stand_in(versions[target])[0])
        monkeypatch.setattr("export.build.run_build.unavailable_reason", lambda target: None)
        monkeypatch.setattr("export.build.run_build.runs_here", lambda options: False)
        monkeypatch.setattr("export.engine.engine_writer.build", self.build)

    def build(self, graph: bytes, options: BuildOptions, timing_cache: bytes | None) -> BuiltEngine:
        self.attempts.append(Attempt(onnx.load_from_string(graph), options, timing_cache))
        self.before(self.attempts[-1])
        scenario = self.scenarios.pop(0) if len(self.scenarios) > 1 else self.scenarios[0]
        times = b"%d" % len(self.attempts)
        return BuiltEngine(self.plan, "tensorrt 11.4.0", True, inspected(scenario), times)
