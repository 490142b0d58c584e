"""Train narrow networks in two processes that the launcher of torchrun forks."""

from __future__ import annotations

import runpy
import sys
import uuid

from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def _train(arguments: list[str]) -> None:
    sys.argv = ["train", *arguments]
    try:
        runpy.run_module("tests.train.training.narrow", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        # The launcher expects that a process returns.
        if ended.code:
            raise


if __name__ == "__main__":
    # The options of `torchrun --standalone --nproc-per-node 2`.
    config = LaunchConfig(1, 1, 2, run_id=str(uuid.uuid4()), rdzv_backend="c10d", rdzv_endpoint="localhost:0")
    config.start_method = "fork"
    elastic_launch(config, _train)(sys.argv[1:])
