"""Decode video files, extract clip features and write clips.

All packages except `runtime.core`, `artifacts`, `backends` and `datasets` may import it.
"""

from __future__ import annotations
