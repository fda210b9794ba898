"""What ``/metrics`` says, in a registry of its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "adajudge_requests", "Requests answered.", ["endpoint", "status"], registry=registry
        )
        self.seconds = Histogram(
            "adajudge_request_seconds",
            "Request to answer.",
            ["endpoint"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.refused = Counter("adajudge_refused_requests", "Requests refused.", ["type"], registry=registry)
        self.bad_rows = Counter("adajudge_bad_rows", "Rows without a score.", ["type"], registry=registry)
        self.rows = Counter("adajudge_rows", "Responses scored.", registry=registry)
        self.tokens = Counter("adajudge_tokens", "Tokens of the responses scored.", registry=registry)
        self.truncated = Counter(
            "adajudge_truncated_rows", "Responses scored of which something was cut.", registry=registry
        )
        self.accepted = Gauge(
            "adajudge_rows_accepted", "Responses accepted and not yet answered.", registry=registry
        )
        self.waiting = Gauge(
            "adajudge_rows_waiting", "Responses that wait for the engine.", registry=registry
        )
        self.token_budget = Gauge(
            "adajudge_token_budget", "Tokens the engine reads at once now.", registry=registry
        )
        self.batch_rows = Histogram(
            "adajudge_batch_rows", "Responses scored together.", buckets=_ROWS, registry=registry
        )
        self.busy = Counter("adajudge_engine_busy_seconds", "Time the engine worked.", registry=registry)

    def text(self) -> bytes:
        """The Prometheus exposition format."""
        return generate_latest(self.registry)
