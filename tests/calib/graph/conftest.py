"""Share the exported graphs of `tests/export` with the tests of graph passes."""

from tests.export.conftest import checkpoint, exported, networks
from tests.train.training.narrow import narrow_backbone

__all__ = ["checkpoint", "exported", "narrow_backbone", "networks"]
