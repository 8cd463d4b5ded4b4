"""What Prometheus scrapes: the engine's counts, and the requests and times that a server adds."""

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from gemcut.engine.serving.metrics import DESCRIPTIONS

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class ServerMetrics:
    """Metrics of one server, in a registry of its own."""

    def __init__(self, engine_metrics: Callable[[], dict[str, Any]]) -> None:
        self._registry = registry = CollectorRegistry()
        registry.register(_EngineCollector(engine_metrics))

        def histogram(name: str, what: str) -> Histogram:
            return Histogram(f"gemcut_{name}_seconds", what, registry=registry, buckets=SECONDS)

        self.time_to_first_token = histogram(
            "time_to_first_token", "From a request's arrival to the first token of a choice"
        )
        self.time_between_tokens = histogram(
            "time_between_tokens", "From one token of a choice to its next"
        )
        self.request_time = histogram("request", "From a request's arrival to its end")
        self.requests = Counter(
            "gemcut_http_requests", "Requests ended", ("path", "status"), registry=registry
        )
        self.open_requests = Gauge(
            "gemcut_open_requests", "Requests that run or wait", registry=registry
        )

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCollector:
    """The engine's metrics, read when they are asked for."""

    def __init__(self, read: Callable[[], dict[str, Any]]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        values = self._read()
        for name, (kind, description) in DESCRIPTIONS.items():
            family = CounterMetricFamily if kind == "counter" else GaugeMetricFamily
            yield family(f"gemcut_{name}", description, value=values[name])
        ended = CounterMetricFamily(
            "gemcut_completions", "Completions that have ended, by reason", labels=["reason"]
        )
        for reason in ("stop", "length", "abort", "error"):
            ended.add_metric([reason], values["ended"].get(reason, 0))
        yield ended

    def describe(self) -> list[Metric]:
        return []
