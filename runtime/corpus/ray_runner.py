"""Ground shards in the processes of a Ray cluster, or of a local Ray that is started for the job."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from runtime.core.cpu_info import cores
from runtime.core.errors import DeviceError, importing, one_line
from runtime.core.interrupts import preserved
from runtime.corpus.sharding import Settings, Shard
from runtime.corpus.worker import CorpusJob, ShardResult, Worker

log = logging.getLogger("drn")

# Ray's object store holds only plans of shards, some kilobytes each, and their results.
OBJECT_STORE_BYTES = 1 << 27
SECONDS_TO_END = 1.0
# Usage statistics are not sent to the makers of Ray.
NO_STATISTICS = {"RAY_USAGE_STATS_ENABLED": "0"}
# With this variable a local Ray binds to the loopback address on Linux too.
LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


class Actor:
    """A worker and its model. Ray Data creates one actor per process."""

    def __init__(self, job: CorpusJob) -> None:
        self._worker = Worker(job)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        return {"result": [pickle.dumps(self._worker(pickle.loads(item))) for item in batch["shard"]]}


def run_on_ray(
    job: CorpusJob, shards: Sequence[Shard], actors: int | None, address: str | None
) -> Iterator[ShardResult]:
    """Yield the result of each shard, in order of completion.

    Args:
        actors: number of processes; None uses all free resources of the cluster.
        address: address of a cluster, or auto; None for the cluster that this process is in, or else a local Ray.

    Raises:
        DeviceError: Ray is not installed, or the cluster is not available.
    """
    settings = job.settings
    with _ray(address, actors, settings) as ray:
        cluster = ray.cluster_resources()
        needs_gpu = settings.device == "cuda"
        available = int(cluster.get("GPU", 0)) if needs_gpu else int(cluster.get("CPU", 0)) // settings.threads
        requested = actors or max(1, available)
        if requested > available:
            log.warning(
                "The cluster has resources for %d processes of %s now, and %d are requested. The others wait.",
                available,
                "one GPU" if needs_gpu else f"{settings.threads} CPU cores",
                requested,
            )
        size = min(requested, len(shards))
        items = [{"shard": pickle.dumps(shard)} for shard in shards]
        resources: dict[str, Any] = {"num_gpus": 1} if needs_gpu else {"num_cpus": settings.threads}
        # With one block per shard, only the shard of a process that ended is repeated.
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            Actor,
            fn_constructor_args=(job,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=2),
            **resources,
        )
        dataset.context.enable_progress_bars = False
        dataset.context.print_on_execution_start = False
        try:
            for row in dataset.iter_rows():
                yield pickle.loads(row["result"])
        except ray.exceptions.RayError as error:
            raise DeviceError(
                f"Ray failed ({type(error).__name__}: {one_line(error)[:300]}). Complete shards remain; run the same "
                "command again to resume.",
                code="ray_failed",
            ) from error


@contextlib.contextmanager
def _ray(address: str | None, actors: int | None, settings: Settings) -> Iterator[Any]:
    """Yield Ray, connected to a cluster; disconnect it, or end a local Ray, after the block."""
    for name, value in {**NO_STATISTICS, **(LOOPBACK_ONLY if address is None else {})}.items():
        os.environ.setdefault(name, value)
    with importing("Ray", "corpus", ", or pass --actors 0 to ground in this process"):
        import ray
        import ray.data
    # Ray Data logs its plans and progress bars.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if ray.is_initialized():
        yield ray
        return
    try:
        # Ray installs a handler that ends the process at SIGTERM without a message.
        with preserved():
            if address is None:
                ray.init(
                    "local",
                    num_cpus=actors * settings.threads if actors and settings.device == "cpu" else cores(),
                    object_store_memory=OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    logging_level=logging.ERROR,
                )
            else:
                ray.init(address, logging_level=logging.ERROR)
    # Ray raises its own errors, ConnectionError, ValueError for a malformed address, and RuntimeError for a missing
    # token.
    except Exception as error:
        action = "start on this machine" if address is None else f"connect to --address {address}"
        raise DeviceError(
            f"Ray cannot {action}: {one_line(error)[:300]}. Check the cluster, or pass --actors 0 to ground in this "
            "process.",
            code="ray_failed",
        ) from error
    try:
        yield ray
    finally:
        failed = sys.exc_info()[0] is not None
        ray.shutdown()
        if failed and address is not None:
            # The cluster ends the workers a moment later, and their files can be removed only after that.
            time.sleep(SECONDS_TO_END)
