"""What is counted, in Prometheus' format. Labels are few and fixed: no text, no id, no address ever becomes one."""

from __future__ import annotations

import math
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serving.requests import Done
from serving.stores import StoreUnavailable

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "synapse_http_requests", "Requests answered.", ["method", "route", "status"], registry=registry
        )
        self._seconds = Histogram(
            "synapse_http_request_seconds", "Until the answer's end.", ["route"], buckets=SECONDS, registry=registry
        )
        self._tokens = Counter("synapse_tokens", "Tokens read and written.", ["kind"], registry=registry)
        self._outputs = Counter("synapse_outputs", "Outputs by how they ended.", ["finish"], registry=registry)
        self._first = Histogram(
            "synapse_first_token_seconds", "From request to first token.", buckets=SECONDS, registry=registry
        )
        self._between = Histogram(
            "synapse_inter_token_seconds", "From token to token.", buckets=SECONDS, registry=registry
        )

    def watch(self, name: str, about: str, value: Callable[[], float]) -> None:
        """Adds a figure that is asked for whenever the metrics are read; NaN where a store does not answer."""

        def asked() -> float:
            try:
                return value()
            except StoreUnavailable:
                return math.nan

        Gauge(name, about, registry=self._registry).set_function(asked)

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """A response has gone out, or its client has gone."""
        self._requests.labels(method if method in METHODS else "other", route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def first_token(self, seconds: float) -> None:
        """A request has its first token."""
        self._first.observe(seconds)

    def next_token(self, seconds: float) -> None:
        """A request has one more."""
        self._between.observe(seconds)

    def finished(self, done: Done) -> None:
        """An output is complete."""
        self._outputs.labels(done.finish).inc()
        self._tokens.labels("prompt").inc(done.prompt_tokens)
        self._tokens.labels("output").inc(done.output_tokens)

    def text(self) -> bytes:
        """All of it."""
        return generate_latest(self._registry)
