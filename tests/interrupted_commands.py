"""Make a command wait at one step, so that a test can interrupt it there."""

from __future__ import annotations

import importlib
import inspect
import pathlib
import time
from collections.abc import Callable
from typing import Any

from tests.forked_commands import LASTING, use_narrow_backbone


def stop_before_rename(module: str, directory: str, traces: str, half_way: Callable[[], None]) -> None:
    """Let a command stop when its first file in a directory is complete under its temporary name."""
    if module == "export.to_onnx":
        from tests.shared_builds import traced_once

        LASTING.enter_context(traced_once(pathlib.Path(traces)))
        use_narrow_backbone(half_way)
    chmod = pathlib.Path.chmod

    def stop(path: pathlib.Path, mode: int) -> None:
        if str(path).startswith(directory):
            half_way()
            time.sleep(60)
        chmod(path, mode)

    pathlib.Path.chmod = stop  # type: ignore[method-assign, assignment]


def repeat_call(call: str, half_way: Callable[[], None]) -> None:
    """Let a command repeat its first call of a function, given as MODULE:NAME, until it is interrupted."""
    module, name = call.split(":")
    owner_name, _, name = name.rpartition(".")
    owner: Any = importlib.import_module(module)
    owner = getattr(owner, owner_name) if owner_name else owner
    original = getattr(owner, name)

    def repeat(*values: Any, **named: Any) -> None:
        half_way()
        for _ in range(100000):
            original(*values, **named)

    setattr(owner, name, staticmethod(repeat) if inspect.ismethod(original) else repeat)


def wait_after_uploads(half_way: Callable[[], None]) -> None:
    """Let a service wait when it has created its directory for uploads."""
    from runtime.service.uploads import Uploads

    create = Uploads.__init__

    def wait(*values: Any, **named: Any) -> None:
        create(*values, **named)
        half_way()
        time.sleep(1)

    Uploads.__init__ = wait  # type: ignore[method-assign]
