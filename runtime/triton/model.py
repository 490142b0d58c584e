"""Load the front of a DRN model in Triton, from queries and clip features to moments. It needs drn-deploy installed."""

from __future__ import annotations

from pathlib import Path

import triton_python_backend_utils as pb_utils

from runtime.triton.front import Front


class TritonPythonModel:
    """The model that Triton's Python backend loads from model.py."""

    def initialize(self, args):  # type: ignore[no-untyped-def]
        self.front = Front(pb_utils, args, Path(__file__).parent)

    def execute(self, requests):  # type: ignore[no-untyped-def]
        return self.front.execute(requests)
