"""A server's Prometheus metrics of the sleep pool, beside vLLM's own `vllm:engine_sleep_state`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import Gauge, Histogram

BYTES = Gauge(
    "rlhf_npu:sleep_pool_bytes",
    "Bytes of a tag after the last sleep or wake-up, all workers together: on the device, and in backups on the host.",
    ["model_name", "tag", "place"],
    multiprocess_mode="mostrecent",
)
SECONDS = Histogram(
    "rlhf_npu:sleep_pool_seconds",
    "Seconds that a tag of the slowest worker took to sleep or to wake up.",
    ["model_name", "tag", "phase"],
    buckets=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
)
PHASES = ("sleep", "wake")
WorkerStats = Mapping[str, Mapping[str, Any]]


class SleepMetrics:
    """Those of one engine."""

    def __init__(self, model_name: str) -> None:
        self._model = model_name
        self._seen: dict[tuple[str, str], float] = {}

    def publish(self, workers: Sequence[WorkerStats]) -> None:
        """Take over each worker's statistics by tag (`SleepMixin.sleep_pool_stats`) after a sleep or a wake-up."""
        for tag in {tag for worker in workers for tag in worker}:
            stats = [worker[tag] for worker in workers if tag in worker]
            BYTES.labels(self._model, tag, "device").set(sum(one["mapped"] for one in stats))
            BYTES.labels(self._model, tag, "host").set(sum(one["host"] for one in stats))
            for phase in PHASES:
                self._observe(tag, phase, max(one[phase]["seconds"] for one in stats))

    def _observe(self, tag: str, phase: str, seconds: float) -> None:
        """A pool says how long the last sleep or wake-up took that moved something: it is counted once."""
        if seconds != self._seen.get((tag, phase), 0.0):
            self._seen[tag, phase] = seconds
            SECONDS.labels(self._model, tag, phase).observe(seconds)
