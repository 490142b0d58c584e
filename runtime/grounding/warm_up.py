"""Run a model once for the sizes that a program will ask, before it asks them."""

from __future__ import annotations

import logging
import time

from runtime.backends.batch_shapes import bucket
from runtime.core.errors import DeviceMemoryError
from runtime.datasets.presets import length_quantiles_of, query_length_of
from runtime.grounding.grounder import Grounder

log = logging.getLogger("drn")

# Between two lines on progress.
PROGRESS_SECONDS = 2.0


def warm_usual(grounder: Grounder, batch_size: int) -> int:
    """Warm a model for batches of up to `batch_size` queries of usual lengths; progress goes to the log.

    Usual are lengths up to the 99 % quantile of the queries that the model was trained on, and the shortest query of
    each plan of an engine, so that every plan has run. If the memory of the device is full, the other sizes are
    prepared when they are asked, which a warning says.

    Args:
        grounder: the model.
        batch_size: queries asked together at most; a network that takes fewer gets them in pieces.

    Returns:
        The number of shapes that were run; 0 on a CPU.
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
        log.warning("%s Sizes that are not warm yet are prepared when they are asked.", error)
        return 0
    if count:
        log.info("Warmed the model for %d sizes in %.1f s.", count, time.monotonic() - start)
    return count


def usual_sizes(grounder: Grounder, batch_size: int) -> tuple[list[int], list[int]]:
    """Return the batch sizes and query lengths, in tokens, that are usual for a model; see `warm_usual`."""
    training, backend = grounder.manifest.training, grounder.backend
    quantiles = length_quantiles_of(training)
    longest = quantiles[0][1] if quantiles else query_length_of(training)[1]
    largest = min(batch_size, getattr(backend, "largest_batch", batch_size))
    batches = sorted({min(bucket(size), largest) for size in range(1, largest + 1)})
    limit = min(grounder.manifest.max_query_length, getattr(backend, "longest_query", longest))
    longest = min(longest, limit)
    first = [length for length in getattr(backend, "first_lengths", ()) if length <= limit]
    return batches, sorted({*range(1, longest + 1), *first})
