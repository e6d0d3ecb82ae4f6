"""Whether a run fits on its devices, and what sleeps when: known before anything of it is there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from transformers import AutoModelForSequenceClassification

from rlhf_npu.config import PPOConfig
from rlhf_npu.engines.model_fit import CRITIC, POLICY, Skeleton
from rlhf_npu.engines.reward_model_fit import REWARD_MODEL, scoring_model
from rlhf_npu.errors import PlanError
from rlhf_npu.hybrid.memory.memory_demand import (
    GIB,
    Device,
    MemoryDemand,
    Models,
    Surplus,
    device_of,
    memory_demand,
)
from rlhf_npu.hybrid.memory.model_shape import ModelShape, model_shape, shape_of_folder
from rlhf_npu.hybrid.memory.nearest_fit import nearest_fit
from rlhf_npu.hybrid.memory.occupancy import Occupancy
from rlhf_npu.hybrid.switch_plan import Policy, Stage, SwitchPlan, plan_switches
from rlhf_npu.hybrid.tags import cycle_of
from rlhf_npu.platform import Platform

NO_SURPLUS = Surplus()


@dataclass(frozen=True)
class MemoryPlan:
    """A run that fits.

    Attributes:
        workspace: bytes that each stage is expected to take beside the tags that are awake in it.
        device: that it fits on.
        kv_cache_bytes: of the tag `kv_cache`.
        switch_plan: what is awake in each stage, and the bytes that each tag is expected to hold on one device.
        sharing: what of the actor's parameters the rollout generates with, in words; empty if that was not asked for.
    """

    workspace: Mapping[Stage, int]
    device: Device
    kv_cache_bytes: int
    switch_plan: SwitchPlan
    sharing: str = ""

    @property
    def capacity(self) -> int:
        """Bytes of one device that may be used."""
        return self.device.capacity

    def used(self, stage: Stage) -> int:
        """Bytes in use in `stage`."""
        return self.switch_plan.awake_bytes(stage) + self.workspace[stage]

    @property
    def fullest(self) -> Stage:
        """The stage of a step in which most is in use."""
        return max(self.switch_plan.cycle, key=self.used)

    @property
    def peak(self) -> int:
        """Bytes in use in the fullest stage."""
        return self.used(self.fullest)

    def __str__(self) -> str:
        offloaded, dropped = self.switch_plan.offloaded(), self.switch_plan.dropped()
        sleeps = [f"{', '.join(offloaded)} to the host"] if offloaded else []
        sleeps += [f"{', '.join(dropped)} dropped"] if dropped else []
        return (
            f"memory of a device, as predicted: {self.peak / GIB:.2f} of {self.capacity / GIB:.2f} GiB at the peak, in "
            f"stage '{self.fullest.value}'; asleep when not needed: {'; '.join(sleeps) or 'nothing'}"
            f"{self.sharing and f'; {self.sharing}'}"
        )


def check_memory(config: PPOConfig, policy: Skeleton, platform: Platform) -> MemoryPlan:
    """The plan of a run, before any memory of a device is taken.

    Args:
        config: with local paths of models.
        policy: without weights.

    Raises:
        PlanError: it does not fit; names stage and tag, and the nearest settings with which it would.
        DeviceError: the driver does not say how much memory a device has.
        ModelError: the critic's model or the reward model cannot be built.
    """
    return fitting_plan(config, models_of(config, model_shape(policy.module)), device_of(config, platform))


def models_of(config: PPOConfig, policy: ModelShape | None = None) -> Models:
    """The shapes of the models that `config` names; that of the policy, if it is known already.

    Raises:
        ModelError: transformers cannot build one of them.
    """
    model = config.actor_rollout_ref.model
    policy = policy or shape_of_folder(model, POLICY)
    path = config.critic.model.path if config.has_critic else None
    critic = shape_of_folder(replace(model, path=path), CRITIC) if path else policy
    reward = None
    if config.reward_model.enable:
        reward = shape_of_folder(scoring_model(config), REWARD_MODEL, AutoModelForSequenceClassification)
    return Models(policy, critic, reward)


def fitting_plan(config: PPOConfig, models: Models, device: Device) -> MemoryPlan:
    """The plan of a run on `device`.

    Raises:
        PlanError: it does not fit; names stage and tag, and the nearest settings with which it would.
    """
    try:
        return plan_memory(config, models, device)
    except PlanError as error:
        words = f"{error}; {advice(config, models, device, error.stage)}"
        raise PlanError(words, stage=error.stage, tag=error.tag, missing=error.missing) from None


def advice(config: PPOConfig, models: Models, device: Device, stage: str, surplus: Surplus = NO_SURPLUS) -> str:
    """The nearest settings, in words, with which a run would fit on `device` that bursts in `stage`.

    Args:
        surplus: what the run was seen to take beyond the prediction; with other settings it is taken to be the same.
    """

    def fits(other: PPOConfig) -> bool:
        try:
            plan_memory(other, models, device, surplus)
        except PlanError:
            return False
        return True

    overrides = nearest_fit(config, models.policy, stage, device.name == "cpu", fits)
    return f"it would fit with {' '.join(overrides)}" if overrides else "no setting was found that would fit"


def plan_memory(config: PPOConfig, models: Models, device: Device, surplus: Surplus = NO_SURPLUS) -> MemoryPlan:
    """As `fitting_plan`, without advice.

    Raises:
        PlanError: it does not fit.
    """
    demand = memory_demand(config, models, device).with_surplus(surplus)
    _check_cache(demand)
    policy = Policy(config.hybrid.plan)
    switch_plan = plan_switches(demand.tags, cycle_of(config), demand.workspace, device.capacity, policy)
    return MemoryPlan(demand.workspace, device, demand.kv_cache_bytes, switch_plan, str(demand.sharing))


def occupancy(config: PPOConfig, models: Models, device: Device, plan: MemoryPlan | None) -> Occupancy:
    """Who holds what in each stage; for a run that does not fit, at the least that it could do with."""
    demand = memory_demand(config, models, device)
    stages = (*cycle_of(config), Stage.SAVE)
    keeps = config.hybrid.plan == Policy.KEEP.value
    least = {
        stage: frozenset(tag.name for tag in demand.tags if stage in tag.needed or (keeps and not tag.group))
        for stage in stages
    }
    awake = {stage: plan.switch_plan.awake[stage] for stage in stages} if plan else least
    return Occupancy(demand.tags, awake, demand.workspace, device.capacity)


def _check_cache(demand: MemoryDemand) -> None:
    missing = demand.least_cache_bytes - demand.kv_cache_bytes
    if missing > 0:
        raise PlanError(
            f"stage '{Stage.GENERATE.value}' does not fit: {demand.kv_cache_bytes / GIB:.3f} GiB are left for the tag "
            f"kv_cache, and one sequence of the full length takes {demand.least_cache_bytes / GIB:.3f} GiB",
            stage=Stage.GENERATE.value,
            tag="kv_cache",
            missing=missing,
        )
