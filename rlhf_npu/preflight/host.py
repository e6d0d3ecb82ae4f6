"""The host's memory: a level-1 sleep keeps the weights there."""

from __future__ import annotations

from pathlib import Path

from allocator import MemoryInfo, SleepPool
from rlhf_npu.platform import PLATFORMS
from rlhf_npu.preflight.report import Check, Status, attempt, readable

_MEMORY = Path("/proc/meminfo")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def host_checks(pool: SleepPool) -> list[Check]:
    """Whether the host can hold what the devices' weights take asleep, and at which speed it is made ready."""
    kind = pool.device.partition(":")[0]
    # The CPU's pool counts what this process can have: the machine's memory, within its containers' limits.
    memory = SleepPool.get("cpu", namespace="preflight").memory_info
    checks = [
        attempt("available memory", lambda: _available_check(pool, memory())),
        attempt("container's limit", lambda: container_check(memory().total, _machine_memory())),
    ]
    if kind == "cuda":
        checks.append(huge_pages_check(_HUGE_PAGES.read_text() if _HUGE_PAGES.is_file() else ""))
    return checks


def _available_check(pool: SleepPool, host: MemoryInfo) -> Check:
    if pool.device == "cpu":
        value = f"{readable(host.free)}; the CPU's sleeping weights stay in it"
        return Check("available memory", Status.INFO, value, measured={"free": host.free, "total": host.total})
    devices = PLATFORMS[pool.device.partition(":")[0]].count()
    return available_check(host.free, pool.memory_info().total, devices)


def available_check(free: int, device_memory: int, devices: int) -> Check:
    """Free host memory against weights that fill every device, the most that a level-1 sleep can ask for."""
    needed = device_memory * devices
    value = f"{readable(free)}; weights that fill {devices} x {readable(device_memory)} need {readable(needed)} asleep"
    measured = {"free": free, "needed": needed}
    if free >= needed:
        return Check("available memory", Status.OK, value, measured=measured)
    advice = f"level 1 holds up to {readable(free // devices)} of weights a device here; level 2 takes none of it"
    return Check("available memory", Status.WARNING, value, advice, measured)


def container_check(limit: int, machine: int) -> Check:
    """Whether a control group leaves this process less than the machine has."""
    if limit >= machine:
        return Check("container's limit", Status.OK, f"none below the machine's {readable(machine)}")
    advice = "sleeping weights count against it: give the container more if they do not fit"
    return Check("container's limit", Status.INFO, f"{readable(limit)} of the machine's {readable(machine)}", advice)


def _machine_memory() -> int:
    line = next(line for line in _MEMORY.read_text().splitlines() if line.startswith("MemTotal:"))
    return int(line.split()[1]) * 1024


def huge_pages_check(setting: str) -> Check:
    """Whether host memory can be made of huge pages, which are ready sooner than small ones."""
    name = "transparent huge pages"
    if "[always]" in setting or "[madvise]" in setting:
        return Check(name, Status.OK, setting.strip())
    advice = f"the first sleep takes longer; as root: echo madvise > {_HUGE_PAGES}"
    return Check(name, Status.WARNING, setting.strip() or "cannot be read", advice)
