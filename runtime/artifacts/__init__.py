"""Read and write the metadata in and beside model files, and encoded videos.

All packages except `runtime.core` may import it.
"""

from __future__ import annotations
