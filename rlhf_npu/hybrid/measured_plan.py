"""The switch plan from what tags hold and stages take, the same on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from allocator import SleepPool
from rlhf_npu.config import PPOConfig
from rlhf_npu.engines.collectives import MAX, all_reduce
from rlhf_npu.errors import PlanError
from rlhf_npu.hybrid.engine import HybridEngine
from rlhf_npu.hybrid.memory.memory_demand import Surplus
from rlhf_npu.hybrid.memory.memory_plan import MemoryPlan
from rlhf_npu.hybrid.switch_plan import Policy, Stage, SwitchPlan, plan_switches
from rlhf_npu.hybrid.tags import cycle_of, make_tags, shares_weights
from rlhf_npu.platform import Platform


@dataclass(frozen=True)
class SecondPlan:
    """What the first step decided, the same on every rank.

    Attributes:
        plan: by which the engines take turns from then on.
        burst: why that is the first step's, though it does not fit; None where the plan fits.
        surplus: what was seen beyond the prediction.
    """

    plan: SwitchPlan
    burst: PlanError | None
    surplus: Surplus


def measured_plan(
    config: PPOConfig,
    tags: Sequence[str],
    workspace: Mapping[Stage, int],
    capacity: int,
    platform: Platform,
    shares_weights: bool,
) -> SwitchPlan:
    """The plan for the tags as they are; every rank calls this together and gets the same.

    Args:
        tags: all that the pool holds, by name.
        workspace: bytes that each stage takes beside them.
        capacity: bytes that one device may use.
        shares_weights: whether the rollout generates with the actor's parameters.

    Raises:
        PlanError: it does not fit.
    """
    return _plan(config, _sizes(tags, platform), workspace, capacity, shares_weights)


def plan_again(hybrid: HybridEngine, config: PPOConfig, predicted: MemoryPlan, platform: Platform) -> SecondPlan:
    """Let the first step decide the plan of those that follow; ends the engine's calibration.

    Every rank calls this together. Without a calibration everything stays as it is.
    """
    if hybrid.calibration is None:
        return SecondPlan(hybrid.plan, None, Surplus())
    seen = {stage.value: hybrid.calibration.workspace.get(stage, 0) for stage in Stage}
    largest = _largest(seen, platform.device())
    sizes = _sizes([tag.name for tag in hybrid.plan.tags], platform)
    second = second_plan(config, hybrid.plan, sizes, {stage: largest[stage.value] for stage in Stage}, predicted)
    hybrid.plan, hybrid.calibration = second.plan, None
    return second


def second_plan(
    config: PPOConfig,
    first: SwitchPlan,
    sizes: Mapping[str, int],
    seen: Mapping[Stage, int],
    predicted: MemoryPlan,
) -> SecondPlan:
    """The plan for tags as they are, and for the larger of what was predicted and what was seen beside them.

    A step that was shorter than those to come took less than they will, so what was predicted counts as well. What ran
    once may run again: should nothing fit, the plan of the first step stays.

    Args:
        first: by which the first step ran.
        sizes: bytes that each tag holds.
        seen: bytes that each stage took beside the tags.
    """
    workspace = {stage: max(seen.get(stage, 0), predicted.workspace.get(stage, 0)) for stage in Stage}
    expected = {tag.name: tag.bytes for tag in predicted.switch_plan.tags}
    surplus = Surplus(
        {tag: max(0, size - expected.get(tag, 0)) for tag, size in sizes.items()},
        {stage: size - predicted.workspace.get(stage, 0) for stage, size in workspace.items()},
    )
    try:
        plan = _plan(config, sizes, workspace, predicted.capacity, shares_weights(first.tags))
    except PlanError as error:
        return SecondPlan(first, error, surplus)
    return SecondPlan(plan, None, surplus)


def _plan(
    config: PPOConfig, sizes: Mapping[str, int], workspace: Mapping[Stage, int], capacity: int, shared: bool
) -> SwitchPlan:
    tags = make_tags(sizes, str(config.actor_rollout_ref.rollout.sleep_level), shared)
    return plan_switches(tags, cycle_of(config), workspace, capacity, Policy(config.hybrid.plan))


def _sizes(tags: Sequence[str], platform: Platform) -> dict[str, int]:
    """Bytes that each tag holds, on the rank where it holds most."""
    return _largest(_held_bytes(SleepPool.get(platform.device()), tags), platform.device())


def _held_bytes(pool: SleepPool, tags: Sequence[str]) -> dict[str, int]:
    """Bytes that each tag holds, awake or asleep."""
    stats = pool.stats()
    return {tag: stats[tag].mapped + stats[tag].asleep for tag in tags}


def _largest(values: Mapping[str, int], device: torch.device) -> dict[str, int]:
    """The largest of each value over all ranks."""
    local = torch.tensor(list(values.values()), dtype=torch.int64, device=device)
    return dict(zip(values, all_reduce(local, MAX).tolist(), strict=True))
