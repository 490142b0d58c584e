"""Shards on the processes of a Ray cluster, or of a Ray that is started here for them."""

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
from runtime.core.errors import DeviceError, one_line
from runtime.core.interrupts import preserved
from runtime.corpus.sharding import Settings, Shard
from runtime.corpus.worker import CorpusJob, ShardResult, Worker

log = logging.getLogger("drn")

# Shards travel through Ray as plans of some kilobytes, and back as a line.
OBJECT_STORE_BYTES = 1 << 27
SECONDS_TO_END = 1.0
# Nothing is reported to Ray's makers.
QUIET = {"RAY_USAGE_STATS_ENABLED": "0"}
# A Ray that is started here listens to this machine alone. The name is Ray's: it speaks of systems on which it always
# does so.
ALONE = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


class Actor:
    """The object that Ray Data creates once per process: a worker and its model."""

    def __init__(self, job: CorpusJob) -> None:
        self._worker = Worker(job)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        return {"done": [pickle.dumps(self._worker(pickle.loads(item))) for item in batch["shard"]]}


def run_on_ray(
    job: CorpusJob, shards: Sequence[Shard], actors: int | None, address: str | None
) -> Iterator[ShardResult]:
    """Yield what becomes of each shard, in the order in which they end.

    Args:
        job, shards: what is to be done.
        actors: processes; as many as the cluster has room for when None.
        address: of a cluster, or auto; None for the one this process is in or, without it, one that is started.

    Raises:
        DeviceError: Ray is not installed, there is no such cluster, or it has gone.
    """
    settings = job.settings
    with _ray(address, actors, settings) as ray:
        room = _room(ray, settings)
        expected = actors or max(1, room)
        if expected > room:
            log.warning(
                "The cluster has room for %d processes of %s now, and %d were asked for; the others wait for it.",
                room,
                "one GPU" if settings.device == "cuda" else f"{settings.threads} CPU cores",
                expected,
            )
        size = min(expected, len(shards))
        items = [{"shard": pickle.dumps(shard)} for shard in shards]
        needs: dict[str, Any] = {"num_gpus": 1} if settings.device == "cuda" else {"num_cpus": settings.threads}
        # A block for each shard: what ends with a process is made again by itself.
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            Actor,
            fn_constructor_args=(job,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=2),
            **needs,
        )
        dataset.context.enable_progress_bars = False
        dataset.context.print_on_execution_start = False
        try:
            for row in dataset.iter_rows():
                yield pickle.loads(row["done"])
        except ray.exceptions.RayError as error:
            raise DeviceError(
                f"Ray could not go on ({type(error).__name__}: {one_line(error)[:300]}). What is whole stays; run the "
                "same command again to go on."
            ) from error


@contextlib.contextmanager
def _ray(address: str | None, actors: int | None, settings: Settings) -> Iterator[Any]:
    """Yield Ray, connected to a cluster; one that was started for it is gone afterwards."""
    for name, value in {**QUIET, **(ALONE if address is None else {})}.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise DeviceError(
            f"Ray cannot be imported ({error}); "
            "run `pip install '.[corpus]'` in the drn-deploy directory, or pass --actors 0 to ground "
            "in this process.",
            code="missing_library",
        ) from error
    # It logs plans and progress bars of its own.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if ray.is_initialized():
        yield ray
        return
    try:
        # Ray would end the process at SIGTERM without a word.
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
    # Ray's own errors, ConnectionError, ValueError for what is no address, RuntimeError for a token that is missing.
    except Exception as error:
        where = "here" if address is None else f"at --address {address}"
        raise DeviceError(f"No Ray can be had {where}: {one_line(error)[:300]}.") from error
    try:
        yield ray
    finally:
        ended = sys.exc_info()[0] is not None
        ray.shutdown()
        if ended and address is not None:
            # A cluster ends our processes a moment later; what they leave is cleaned up after that.
            time.sleep(SECONDS_TO_END)


def _room(ray: Any, settings: Settings) -> int:
    """Return how many processes the cluster has room for now."""
    resources = ray.cluster_resources()
    if settings.device == "cuda":
        return int(resources.get("GPU", 0))
    return int(resources.get("CPU", 0)) // settings.threads
