"""Grounding over HTTP: requests that arrive together are answered in one batch, and nothing a client sends is run.

`runtime.serve` is the command. Every answer of another status than 200, 201 and 204 is `refusals.Refusal`'s JSON.
"""

from __future__ import annotations
