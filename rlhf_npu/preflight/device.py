"""The device: its driver, how many there are, and how much memory is free."""

from __future__ import annotations

import os

from allocator import SleepPool, SleepPoolError
from rlhf_npu.platform import PLATFORMS
from rlhf_npu.preflight.report import Check, Status, attempt, readable

_VISIBLE = {"npu": "ASCEND_RT_VISIBLE_DEVICES", "cuda": "CUDA_VISIBLE_DEVICES"}
_TOOL = {"npu": "npu-smi info", "cuda": "nvidia-smi"}
_USUAL_GRANULARITY = 2 << 20
_LARGE_PART = 0.1


def open_pool(device: str) -> tuple[Check, SleepPool | None]:
    """The device's pool, in a namespace of its own; opening it finds the driver's library and its functions."""
    try:
        pool = SleepPool.get(device, namespace="preflight")
    except SleepPoolError as error:
        return Check("driver", Status.FAILED, str(error), "without it nothing can sleep on this device"), None
    return Check("driver", Status.OK, "found, with all functions that the pool calls"), pool


def visible_check(kind: str) -> Check:
    """How many devices this process sees, and why."""
    name = "devices"
    if kind == "cpu":
        return Check(name, Status.INFO, f"{PLATFORMS[kind].count()} cores")
    import torch

    variable = _VISIBLE[kind]
    shown = f"{variable}={os.environ[variable]}" if variable in os.environ else f"{variable} is not set"
    module = getattr(torch, kind, None)
    count = 0 if module is None else int(module.device_count())
    if count > 0:
        return Check(name, Status.OK, f"{count} visible; {shown}", measured={"devices": count})
    advice = f"see that {_TOOL[kind]} lists one here, that a container was given it, and that torch is built for it"
    return Check(name, Status.FAILED, f"torch sees none; {shown}", advice)


def memory_checks(pool: SleepPool) -> list[Check]:
    """What the device's memory comes in, and how much of it is free."""
    checks = [attempt("granularity", lambda: granularity_check(pool.granularity()))]
    if pool.device != "cpu":
        checks.append(attempt("device memory", lambda: _capacity_check(pool)))
    return checks


def granularity_check(granularity: int) -> Check:
    """What each segment is rounded up to."""
    measured = {"bytes": granularity}
    if granularity <= _USUAL_GRANULARITY:
        return Check("granularity", Status.OK, readable(granularity), measured=measured)
    advice = f"segments are rounded up to it, from torch's {readable(_USUAL_GRANULARITY)}: small ones waste the rest"
    return Check("granularity", Status.WARNING, readable(granularity), advice, measured)


def _capacity_check(pool: SleepPool) -> Check:
    memory = pool.memory_info()
    held = memory.total - memory.free
    value = f"{readable(memory.free)} free of {readable(memory.total)}"
    measured = {"free": memory.free, "total": memory.total}
    if held <= _LARGE_PART * memory.total:
        return Check("device memory", Status.OK, value, measured=measured)
    tool = _TOOL[pool.device.partition(":")[0]]
    advice = f"another process holds {readable(held)}, which a wake-up may miss; {tool} says which one"
    return Check("device memory", Status.WARNING, value, advice, measured)
