"""A tagged pool of device memory that can sleep: addresses stay, physical memory goes back.

    from allocator import SleepPool

    pool = SleepPool.get("cpu")
    with pool.region("weights"):
        weight = torch.empty(4096, 4096)
    pool.sleep(level=1)  # the weights go to the host, all other tags are discarded
    pool.wake_up()  # same addresses, same weights

Touching memory that sleeps is a segmentation fault on the CPU and a hardware fault on an NPU:
``pool.require_resident(tag)`` raises instead.
"""

from allocator.errors import (
    DriverError,
    ForkedProcessError,
    HookBuildError,
    HookError,
    InternalError,
    InvalidArgumentError,
    OutOfMemoryError,
    PersistentTagError,
    RegionError,
    SleepPoolError,
    TagAsleepError,
    UnknownTagError,
)
from allocator.pool import MemoryInfo, PhaseStats, SleepPool, TagStats

__all__ = [
    "DriverError",
    "ForkedProcessError",
    "HookBuildError",
    "HookError",
    "InternalError",
    "InvalidArgumentError",
    "MemoryInfo",
    "OutOfMemoryError",
    "PersistentTagError",
    "PhaseStats",
    "RegionError",
    "SleepPool",
    "SleepPoolError",
    "TagAsleepError",
    "TagStats",
    "UnknownTagError",
]
