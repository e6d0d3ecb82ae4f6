"""Bytes per tag before and after a switch, beside the operating system's or the driver's own count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from allocator import SleepPool
from rlhf_npu.platform import Platform, resident_bytes


@dataclass(frozen=True)
class Ledger:
    """One look at the memory of this process's device.

    Attributes:
        mapped: bytes of device memory that each tag holds.
        host: bytes of host memory that each tag's backup holds.
        used: bytes of the device that its driver counts as taken, whoever took them: the pool, torch, contexts,
            collectives, other processes. On the CPU the resident bytes of this process.
        capacity: bytes of the device by the same count; None on the CPU, where processes share one memory.
        resident: bytes of the process that the operating system counts.
    """

    mapped: Mapping[str, int]
    host: Mapping[str, int]
    used: int
    capacity: int | None
    resident: int

    @property
    def pooled(self) -> int:
        """Bytes of device memory that all tags hold together."""
        return sum(self.mapped.values())


def read_ledger(platform: Platform) -> Ledger:
    """The ledger now."""
    pool = SleepPool.get(platform.device())
    stats = pool.stats()
    resident = resident_bytes()
    used, capacity = resident, None
    if platform.name != "cpu":
        info = pool.memory_info()
        used, capacity = info.total - info.free, info.total
    return Ledger(
        mapped={tag: tag_stats.mapped for tag, tag_stats in stats.items()},
        host={tag: tag_stats.host for tag, tag_stats in stats.items()},
        used=used,
        capacity=capacity,
        resident=resident,
    )


class PeakMeter:
    """The most device memory in use within a stage, on the scale of `Ledger.used`.

    Drivers do not keep a peak, and torch's own counts what sleeps as well. But within a stage nothing sleeps or wakes,
    so what torch's allocator takes meanwhile, inside regions and outside, is what the driver's count grows by. Memory
    that libraries take past torch is seen at the next stage's begin, if they still hold it then. On the CPU the
    operating system keeps the peak of the process.
    """

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self._used = self._beside = 0
        self._started = False

    def start(self, used: int) -> None:
        """A stage begins with `used` bytes in use."""
        self._platform.reset_peak_held()
        self._used, self._beside, self._started = used, used - self._platform.held_bytes(), True

    def stop(self) -> int | None:
        """The peak since `start`, in bytes; None before the first."""
        if not self._started:
            return None
        # Linux's counts of resident pages differ by a few from one look to the next.
        return max(self._used, self._beside + self._platform.peak_held_bytes())
