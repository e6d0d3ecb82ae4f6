"""Settings that sleep mode depends on: expandable segments, and the variables of rlhf_npu's own workers."""

from __future__ import annotations

import os

from allocator import HookError, SleepPool
from allocator.torch_mem_pool import refuse_expandable_segments
from rlhf_npu.platform import PLATFORMS
from rlhf_npu.preflight.region import region
from rlhf_npu.preflight.report import Check, Status, attempt

_EXPANDABLE = "expandable_segments"


def expandable_check(kind: str) -> Check:
    """Whether an environment variable switches expandable segments on; on the CPU they would do nothing."""
    name = "expandable segments"
    try:
        for affected in ("npu", "cuda") if kind == "cpu" else (kind,):
            refuse_expandable_segments(affected)
    except HookError as error:
        harmless = kind == "cpu"
        advice = "harmless on the CPU, which has none" if harmless else "unset the variable, and run this again"
        return Check(name, Status.WARNING if harmless else Status.FAILED, str(error), advice)
    return Check(name, Status.OK, "not switched on by the environment")


def region_check(pool: SleepPool) -> Check:
    """Makes a tensor in a region; fails where torch passes the pool by, whatever switched that on."""
    return attempt("tensors in a region", lambda: _probe(pool), "until this is ok, nothing that torch makes can sleep")


def _probe(pool: SleepPool) -> Check:
    import torch

    with region(pool, "probe"):
        probe = torch.zeros(1024, device=pool.device)
    tag = pool.stats()["probe"]
    held = tag.live >= probe.nbytes
    value = "are the pool's" if held else f"went elsewhere: the pool holds {tag.live} of {probe.nbytes} bytes"
    return Check("tensors in a region", Status.OK if held else Status.FAILED, value)


def environment_checks(kind: str) -> list[Check]:
    """The variables that rlhf_npu sets for its workers on an accelerator: who starts vLLM otherwise sets them."""
    if kind == "cpu":
        return []
    wanted = PLATFORMS[kind].environment
    # Expandable segments have a check of their own.
    return [_variable_check(name, value) for name, value in wanted.items() if _EXPANDABLE not in value]


def _variable_check(name: str, wanted: str) -> Check:
    value = os.environ.get(name)
    if value is None:
        return Check(name, Status.INFO, f"not set; rlhf_npu sets {wanted} in its workers, set it where you start vLLM")
    if value == wanted:
        return Check(name, Status.OK, value)
    return Check(name, Status.WARNING, value, f"set {name}={wanted}: sleep mode was not tested with another value")
