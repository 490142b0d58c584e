"""Define errors, the command line, file access, and the arithmetic around the network.

Every package may import it; it imports no other package of `runtime`.
"""

from __future__ import annotations
