"""Count the requests, batches and videos of a service for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
PAIRS = (1, 2, 4, 8, 16, 32, 64, 128)


class Telemetry:
    """The metrics of one service, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._requests = self._counter("requests", "Requests by route and status.", ("route", "code"))
        self._request_seconds = self._histogram("request_seconds", "Latency of requests.", SECONDS, "route")
        self._batch_pairs = self._histogram("batch_pairs", "Query-video pairs per batch.", PAIRS)
        self._phase_seconds = self._histogram(
            "phase_seconds",
            "Time of a query in the queue (wait), of a batch (model), and to prepare a video (ready).",
            SECONDS,
            "phase",
        )
        self._lookups = self._counter("video_cache", "Lookups in the cache of prepared videos.", ("result",))
        self._refused = self._counter("refused", "Rejected requests by error code.", ("reason",))
        self.model = Info("drn_model", "The model of the service.", registry=self.registry)

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a metric whose value is computed when it is read.

        Args:
            name: name of the metric without the prefix "drn_".
        """
        Gauge(f"drn_{name}", text, registry=self.registry).set_function(value)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count a response."""
        self._requests.labels(route, str(status)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def refused(self, code: str) -> None:
        """Count a request that was rejected with an error code."""
        self._refused.labels(code).inc()

    def batch(self, pairs: int, waited: Sequence[float], seconds: float) -> None:
        """Record a batch of queries.

        Args:
            pairs: number of query-video pairs.
            waited: seconds that each pair waited in the queue.
            seconds: seconds that the model took.
        """
        self._batch_pairs.observe(pairs)
        for wait in waited:
            self.phase("wait", wait)
        self.phase("model", seconds)

    def phase(self, name: str, seconds: float) -> None:
        """Record the time of a phase.

        Args:
            name: wait (in the queue), model (one batch) or ready (preparation of a video).
        """
        self._phase_seconds.labels(name).observe(seconds)

    def lookup(self, result: str) -> None:
        """Count a lookup in the video cache by its result: hit, joined (another request prepares the video) or miss."""
        self._lookups.labels(result).inc()

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, labels: tuple[str, ...]) -> Counter:
        return Counter(f"drn_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(f"drn_{name}", text, labels, registry=self.registry, buckets=buckets)
