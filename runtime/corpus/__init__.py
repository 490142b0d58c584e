"""A corpus: millions of sentences and videos, grounded shard by shard on however many processes there are."""

from __future__ import annotations
