"""Ground queries in videos, evaluate the results, and format and plot them.

`runtime.benchmarking`, `corpus`, `service`, `triton`, the commands and the packages above `runtime` may import it.
"""

from __future__ import annotations
