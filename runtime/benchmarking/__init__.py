"""Measure the latency of models in turns on one machine, and report it.

`runtime.corpus`, `service`, `triton`, the commands and the packages above `runtime` may import it.
"""

from __future__ import annotations
