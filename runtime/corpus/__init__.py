"""Ground millions of queries and videos in shards, on any number of processes.

The commands of `runtime` and the packages above `runtime` may import it.
"""

from __future__ import annotations
