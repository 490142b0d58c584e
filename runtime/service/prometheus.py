"""Count requests, batches and videos of a service for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
PAIRS = (1, 2, 4, 8, 16, 32, 64, 128)


class Telemetry:
    """Counters of one service; nothing is shared between two in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._requests = self._counter("requests", "Requests by route and status.", ("route", "code"))
        self._request_seconds = self._histogram("request_seconds", "Seconds from request to answer.", SECONDS, "route")
        self._batch_pairs = self._histogram("batch_pairs", "Sentences asked of the model at once.", PAIRS)
        self._phase_seconds = self._histogram(
            "phase_seconds",
            "Seconds: a sentence waits, the model answers a batch, a video is made ready.",
            SECONDS,
            "phase",
        )
        self._looks = self._counter("video_cache", "Looks for a video that is ready, by what was found.", ("result",))
        self._refused = self._counter("refused", "Requests that were refused, by the code of the error.", ("reason",))
        self._model = Info("drn_model", "The model that answers.", registry=self.registry)

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Tell of a value as it is when somebody looks."""
        Gauge(f"drn_{name}", text, registry=self.registry).set_function(value)

    def model(self, about: dict[str, str]) -> None:
        self._model.info(about)

    def answered(self, route: str, status: int, seconds: float) -> None:
        self._requests.labels(route, str(status)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def refused(self, reason: str) -> None:
        self._refused.labels(reason).inc()

    def batch(self, pairs: int, waited: Sequence[float], took: float) -> None:
        self._batch_pairs.observe(pairs)
        for seconds in waited:
            self.phase("wait", seconds)
        self.phase("model", took)

    def phase(self, name: str, seconds: float) -> None:
        self._phase_seconds.labels(name).observe(seconds)

    def looked(self, result: str) -> None:
        self._looks.labels(result).inc()

    def text(self) -> bytes:
        """Return all of it in Prometheus's text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, labels: tuple[str, ...]) -> Counter:
        return Counter(f"drn_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(f"drn_{name}", text, labels, registry=self.registry, buckets=buckets)
