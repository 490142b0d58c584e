"""Run a model once for the usual batch sizes and query lengths, so that later queries do not wait."""

from __future__ import annotations

import logging
import time

from runtime.backends.batch_shapes import bucket
from runtime.core.errors import DeviceMemoryError
from runtime.datasets.presets import length_quantiles_of, query_length_of
from runtime.grounding.grounder import Grounder

log = logging.getLogger("drn")

# Minimum time between two progress messages.
PROGRESS_SECONDS = 2.0


def warm_usual(grounder: Grounder, batch_size: int) -> int:
    """Warm a model for the usual sizes, log the progress, and warn if the device has not enough memory for all.

    Usual query lengths are those up to the 99 % quantile of the training queries, and the shortest query of each plan
    of an engine, so that every plan has run.

    Returns:
        The number of shapes that were run; 0 on a CPU, or if memory ran out.
    """
    batches, lengths = usual_sizes(grounder, batch_size)
    start = last = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal last
        if done == 0:
            log.info("Warming the model for %d sizes ...", total)
        elif done < total and time.monotonic() - last >= PROGRESS_SECONDS:
            last = time.monotonic()
            log.info("Warming the model: %d of %d sizes.", done, total)

    try:
        count = grounder.warm(batches, lengths, progress=progress)
    except DeviceMemoryError as error:
        log.warning("%s The other sizes are prepared at their first query.", error)
        return 0
    if count:
        log.info("Warmed the model for %d sizes in %.1f s.", count, time.monotonic() - start)
    return count


def usual_sizes(grounder: Grounder, batch_size: int) -> tuple[list[int], list[int]]:
    """Return the usual batch sizes, and query lengths in tokens, of a model; see `warm_usual`."""
    training, backend = grounder.manifest.training, grounder.backend
    quantiles = length_quantiles_of(training)
    usual_length = quantiles[0][1] if quantiles else query_length_of(training)[1]
    max_batch = min(batch_size, getattr(backend, "largest_batch", batch_size))
    batches = sorted({min(bucket(size), max_batch) for size in range(1, max_batch + 1)})
    max_length = min(grounder.manifest.max_query_length, getattr(backend, "longest_query", usual_length))
    first = [length for length in getattr(backend, "first_lengths", ()) if length <= max_length]
    return batches, sorted({*range(1, min(usual_length, max_length) + 1), *first})
