"""Mark the steps of a query as NVTX ranges for profilers, if the package `nvtx` is installed."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

DOMAIN = "drn"


def marked(name: str) -> Callable[[Function], Function]:
    """Return a decorator that marks every call of a function as an NVTX range of the domain `drn`.

    Without the package `nvtx`, or with NVTX_DISABLE in the environment when `runtime` is imported, the decorator
    returns the function itself, so that calls have no overhead.
    """
    annotate = _annotate()
    if annotate is None:
        return lambda function: function
    return annotate(message=name, domain=DOMAIN)


def _annotate() -> Any:
    """Return `nvtx.annotate`; None if it is not installed or disabled."""
    if os.environ.get("NVTX_DISABLE"):
        return None
    try:
        from nvtx import annotate
    except ImportError:
        return None
    return annotate
