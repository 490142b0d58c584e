"""A model behind Triton Inference Server: the front that runs inside it, and the client that asks it.

    text and clip features -> front -> query tokens and segments -> network(s) -> heads -> front -> moments

`export.triton` writes the models. `networks` speaks to the networks from either side: the front by calls within the
server, the client over the wire.
"""

from __future__ import annotations
