"""What an arbiter counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter

from vllm_specplus.arbitrage.steps import Step

PREFIX = "vllm:specplus_arbitrate"


class Metrics:
    """Counters in a registry of their own."""

    def __init__(self):
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"{PREFIX}_{name}", text, labels, registry=self.registry)

        self._steps = counter("steps", "Steps of answers by who has written them.", "writer")
        self._tokens = counter("tokens", "Tokens of those steps.", "writer")
        self._seconds = counter("seconds", "Seconds that steps have waited for a part.", "part")
        self._failures = counter("failures", "Times that a part could not do its work.", "part")
        self._answers = counter("answers", "Answers by how they ended.", "end")

    def count(self, step: Step) -> None:
        """A step of an answer."""
        self._steps.labels(step.writer).inc()
        self._tokens.labels(step.writer).inc(step.tokens)
        for part, seconds in step.seconds.items():
            self._seconds.labels(part).inc(seconds)

    def failed(self, part: str) -> None:
        """The draft, the router or the target did not do what it was asked."""
        self._failures.labels(part).inc()

    def ended(self, end: str) -> None:
        """An answer has ended: stop, length, error, or because its client has gone."""
        self._answers.labels(end).inc()

    def value(self, name: str, **labels: str) -> float:
        """What a counter says, as ``value("steps", writer="draft")``."""
        return self.registry.get_sample_value(f"{PREFIX}_{name}_total", labels) or 0.0
