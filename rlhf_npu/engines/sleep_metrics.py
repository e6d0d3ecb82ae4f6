"""A server's Prometheus metrics of the sleep pool, beside vLLM's own `vllm:engine_sleep_state`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import Gauge, Histogram

BYTES = Gauge(
    "rlhf_npu:sleep_pool_bytes",
    "Bytes of a tag after the last sleep or wake-up, all workers together: on the device, and in backups on the host.",
    ["tag", "place"],
    multiprocess_mode="mostrecent",
)
SECONDS = Histogram(
    "rlhf_npu:sleep_pool_seconds",
    "Seconds that a tag of the slowest worker took to sleep or to wake up.",
    ["tag", "phase"],
    buckets=(0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
)
WorkerStats = Mapping[str, Mapping[str, Any]]


def publish(phase: str, workers: Sequence[WorkerStats]) -> None:
    """Take over each worker's statistics by tag (`SleepMixin.sleep_pool_stats`) after a `phase`: "sleep" or "wake"."""
    for tag in {tag for worker in workers for tag in worker}:
        stats = [worker[tag] for worker in workers if tag in worker]
        BYTES.labels(tag, "device").set(sum(one["mapped"] for one in stats))
        BYTES.labels(tag, "host").set(sum(one["host"] for one in stats))
        SECONDS.labels(tag, phase).observe(max(one[phase]["seconds"] for one in stats))
