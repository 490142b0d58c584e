"""Read and write files that may be damaged or hostile, and replace files atomically.

Every package and every module of `runtime.core` may import it.
"""

from __future__ import annotations
