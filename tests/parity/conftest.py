"""Give the networks of these tests the backbone of `models`."""

from tests.train.training.narrow import narrow_backbone

__all__ = ["narrow_backbone"]
