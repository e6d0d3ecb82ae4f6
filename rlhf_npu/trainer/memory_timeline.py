"""Bytes of each tag over time, from what was measured at the switches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf_npu.hybrid.ledger import Ledger
from rlhf_npu.hybrid.switch_report import SwitchReport


@dataclass(frozen=True)
class MemoryPoint:
    """Bytes that each tag held at a time of the wall clock; a tag that is not named held none."""

    time: float
    mapped: Mapping[str, int]


def memory_timeline(reports: Sequence[SwitchReport], before: Ledger | None) -> list[MemoryPoint]:
    """The tags' bytes where they change, of one rank, in order of time.

    The ledger is read when a stage begins. What a phase puts to sleep or wakes changes from the phase's start to its
    end; what no phase names (it was allocated in the stage before) changes when the phases are done.

    Args:
        reports: one rank's, in order.
        before: the memory before the first of them; without it, that before its first phase is not known.
    """
    points: list[MemoryPoint] = []
    now = None if before is None else dict(before.mapped)
    for report in reports:
        after = report.after.mapped
        if now is not None:
            for phase in report.phases:
                points.append(MemoryPoint(phase.start, now))
                now = now | {tag: after[tag] for tag in phase.tags if tag in after}
                points.append(MemoryPoint(phase.end, now))
        now = dict(after)
        points.append(MemoryPoint(report.entered, now))
    return points
