"""Share the exported graphs of `tests/export` with the tests of graph passes."""

from tests.export.conftest import checkpoint, exported, networks

__all__ = ["checkpoint", "exported", "networks"]
