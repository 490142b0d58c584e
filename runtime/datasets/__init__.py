"""Read data sets in their published layouts into one form.

All packages except `runtime.core`, `artifacts` and `backends` may import it.
"""

from __future__ import annotations
