"""Bytes per tag before and after a switch, beside the operating system's or the driver's own count."""

from __future__ import annotations

from dataclasses import dataclass

from allocator import SleepPool
from rlhf_npu.platform import Platform, resident_bytes

GB = 1e9


@dataclass(frozen=True)
class Ledger:
    """One look at the memory of this process.

    Attributes:
        mapped: bytes of device memory that each tag holds.
        host: bytes of host memory that each tag's backup holds.
        resident: bytes of the process that the operating system counts.
    """

    mapped: dict[str, int]
    host: dict[str, int]
    resident: int

    def metrics(self) -> dict[str, float]:
        """`memory/<tag>/{mapped,host}_gb` and `memory/resident_gb`."""
        mapped = {f"memory/{tag}/mapped_gb": size / GB for tag, size in self.mapped.items()}
        host = {f"memory/{tag}/host_gb": size / GB for tag, size in self.host.items()}
        return mapped | host | {"memory/resident_gb": self.resident / GB}


def read_ledger(platform: Platform) -> Ledger:
    """The ledger now."""
    stats = SleepPool.get(platform.device()).stats()
    return Ledger(
        mapped={tag: tag_stats.mapped for tag, tag_stats in stats.items()},
        host={tag: tag_stats.host for tag, tag_stats in stats.items()},
        resident=resident_bytes(),
    )
