"""GET /metrics: what a server has done and is doing, in Prometheus' text format.

The counting and the format are `prometheus_client`'s, Prometheus' own library: it has no dependencies of its own, and
escaping, histograms and the process's memory and CPU time come with it. Each application has a registry to itself, so
two of them in one process (the tests) don't add up.

The engine's own numbers (`engine.stats()`) are read when somebody asks, not copied on every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters and histograms of one server.

    stats: the engine's numbers, a mapping of names to numbers. now: the server's, likewise.
    """

    def __init__(self, stats: Callable[[], Mapping[str, float]], now: Callable[[], Mapping[str, float]]):
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.responses = Counter(
            "puna_responses", "Responses by address and status.", ("path", "status"), registry=self.registry
        )
        self.answers = Counter(
            "puna_answers", "Answers by the reason they ended.", ("finish_reason",), registry=self.registry
        )
        self.prompt_tokens = Counter("puna_prompt_tokens", "Tokens of prompts.", registry=self.registry)
        self.answer_tokens = Counter("puna_answer_tokens", "Tokens of answers.", registry=self.registry)
        self.first_token = Histogram(
            "puna_first_token_seconds", "From the request to its first token.", buckets=_SECONDS, registry=self.registry
        )
        self.whole = Histogram(
            "puna_answer_seconds", "From the request to its last token.", buckets=_SECONDS, registry=self.registry
        )
        self.registry.register(_Read("puna_engine_", stats))
        self.registry.register(_Read("puna_server_", now))

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def counted(self, app, paths: frozenset[str]):
        """ASGI middleware that counts responses; addresses besides `paths` are one, lest a stranger makes them up."""

        async def counting(scope, receive, send):
            if scope["type"] != "http":
                return await app(scope, receive, send)

            async def send_and_count(message):
                if message["type"] == "http.response.start":
                    path = scope["path"] if scope["path"] in paths else "other"
                    self.responses.labels(path, str(message["status"])).inc()
                await send(message)

            await app(scope, receive, send_and_count)

        return counting


class _Read:
    """A collector that reads numbers when it is asked."""

    def __init__(self, prefix: str, read: Callable[[], Mapping[str, float]]):
        self.prefix, self.read = prefix, read

    def collect(self) -> Iterator[Metric]:
        for name, value in self.read().items():
            yield GaugeMetricFamily(self.prefix + name, name.replace("_", " "), value=value)
