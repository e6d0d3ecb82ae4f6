"""Metrics of the memory that each stage of a step had, per tag and in all."""

from __future__ import annotations

from collections.abc import Iterable

from rlhf_npu.hybrid.switch_report import SwitchReport

GB = 1e9


def memory_metrics(reports: Iterable[SwitchReport]) -> dict[str, float]:
    """What the largest rank had, in GB: each metric is the maximum over ranks and over a stage's entries.

    `memory/<stage>/<tag>/mapped_gb`: device memory of a tag when the stage begins.
    `memory/<stage>/used_gb`: what the driver counts then, on the CPU the process's resident memory.
    `memory/<stage>/peak_gb`: the most within the stage, by the same count; see `hybrid.ledger.PeakMeter`. It is known
    when the stage is left: that of a step's last stage is among the metrics of the next step.
    `memory/<tag>/host_gb`: host memory of a tag's backup. `memory/resident_gb`: host memory of the process.
    `perf/max_memory_used_gb`: the largest of all `used_gb` and `peak_gb`. `perf/max_memory_pool_gb`: the largest sum of
    the tags' device memory; what sleeps is in neither.
    """
    largest: dict[str, float] = {}
    for report in reports:
        for name, size in _sizes(report):
            largest[name] = max(largest.get(name, 0.0), size / GB)
    return largest


def _sizes(report: SwitchReport) -> Iterable[tuple[str, int]]:
    stage, after = report.stage.value, report.after
    for tag, size in after.mapped.items():
        yield f"memory/{stage}/{tag}/mapped_gb", size
    for tag, size in after.host.items():
        yield f"memory/{tag}/host_gb", size
    yield f"memory/{stage}/used_gb", after.used
    yield "memory/resident_gb", after.resident
    yield "perf/max_memory_used_gb", after.used
    yield "perf/max_memory_pool_gb", after.pooled
    if report.left is not None:
        yield f"memory/{report.left.stage.value}/peak_gb", report.left.used
        yield "perf/max_memory_used_gb", report.left.used
