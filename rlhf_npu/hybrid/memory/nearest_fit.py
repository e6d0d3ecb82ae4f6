"""The nearest settings with which a run that does not fit would fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from rlhf_npu.config import PPOConfig
from rlhf_npu.config.keys import spell
from rlhf_npu.hybrid.memory.model_shape import ModelShape
from rlhf_npu.hybrid.switch_plan import Stage

CHECKPOINTING = "actor_rollout_ref.model.enable_gradient_checkpointing"
ACTOR_MICRO = "actor_rollout_ref.actor.ppo_micro_batch_size_per_device"
CRITIC_MICRO = "critic.ppo_micro_batch_size_per_device"
LOG_PROB_MICRO = "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_device"
REF_MICRO = "actor_rollout_ref.ref.log_prob_micro_batch_size_per_device"
REWARD_MICRO = "reward_model.micro_batch_size_per_device"
ACTOR_ZERO = "actor_rollout_ref.actor.zero_stage"
CRITIC_ZERO = "critic.zero_stage"
REF_ZERO = "actor_rollout_ref.ref.zero_stage"
REWARD_ZERO = "reward_model.zero_stage"
CACHE_SHARE = "actor_rollout_ref.rollout.gpu_memory_utilization"
SHARE_WEIGHTS = "hybrid.share_weights"
CACHE_SIZE = "actor_rollout_ref.rollout.kv_cache_memory_gb"
TENSOR_PARALLEL = "actor_rollout_ref.rollout.tensor_model_parallel_size"
DEVICES = "trainer.n_devices_per_node"
NODES = "trainer.nnodes"
AUTO = "auto"
LARGEST_NODE, MOST_NODES = 8, 64
CACHE_SIZES = [2.0**power for power in range(-6, 10)]  # GiB
MICRO_OF_STAGE = {
    Stage.TRAIN_ACTOR.value: ACTOR_MICRO,
    Stage.TRAIN_CRITIC.value: CRITIC_MICRO,
    Stage.VALUES.value: CRITIC_MICRO,
    Stage.LOG_PROB.value: LOG_PROB_MICRO,
    Stage.REF.value: REF_MICRO,
    Stage.REWARD_MODEL.value: REWARD_MICRO,
}

Overrides = dict[str, Any]


def nearest_fit(
    config: PPOConfig, shape: ModelShape, stage: str, on_cpu: bool, fits: Callable[[PPOConfig], bool]
) -> list[str]:
    """Overrides with which `config` fits; none if none were found.

    One change is preferred to several, one that costs time to one that costs devices, and of one key the value that is
    nearest to what it is. Where several are needed, none of them could be left out.

    Args:
        stage: that bursts.
        on_cpu: where devices share the memory of a machine.
        fits: whether a configuration does.
    """
    ways = list(_ways(config, shape, stage, on_cpu))
    for way in ways:
        for overrides in way:
            if _is_right(changed := with_overrides(config, overrides)) and fits(changed):
                return _spelled(overrides)
    return _spelled(_several(config, ways, fits))


def with_overrides(node: Any, overrides: Mapping[str, Any]) -> Any:
    """A copy of a configuration, or of a part of it, with other values of some keys."""
    changes: dict[str, Any] = {}
    for key, value in overrides.items():
        name, _, rest = key.partition(".")
        inner = changes.get(name, getattr(node, name))
        changes[name] = with_overrides(inner, {rest: value}) if rest else value
    return replace(node, **changes)


def _several(config: PPOConfig, ways: list[list[Overrides]], fits: Callable[[PPOConfig], bool]) -> Overrides:
    """The furthest of each way, one after the other until it fits, without the dearest that it then fits without."""
    chosen: Overrides = {}
    for overrides in (step for way in ways for step in way):
        trial = chosen | overrides
        if not _is_right(with_overrides(config, trial)):
            continue
        chosen = trial
        if fits(with_overrides(config, chosen)):
            return _without_needless(config, chosen, fits)
    return {}


def _without_needless(config: PPOConfig, chosen: Overrides, fits: Callable[[PPOConfig], bool]) -> Overrides:
    for key in reversed(chosen):
        fewer = {name: value for name, value in chosen.items() if name != key}
        changed = with_overrides(config, fewer)
        if _is_right(changed) and fits(changed):
            chosen = fewer
    return chosen


def _is_right(config: PPOConfig) -> bool:
    return not config.problems() and not config.batch_math.problems()


def _spelled(overrides: Overrides) -> list[str]:
    return [f"{key}={spell(value)}" for key, value in overrides.items()]


def _ways(config: PPOConfig, shape: ModelShape, stage: str, on_cpu: bool) -> Iterator[list[Overrides]]:
    """Each way to need less, as steps of which one after the other needs less still."""
    if config.hybrid.plan == "keep":
        yield [{"hybrid.plan": "auto"}]
    yield _other_caches(config, on_cpu)
    if config.hybrid.share_weights != AUTO:
        yield [{SHARE_WEIGHTS: AUTO}]
    if not config.actor_rollout_ref.model.enable_gradient_checkpointing:
        yield [{CHECKPOINTING: True}]
    yield from _smaller_micro_batches(config, stage)
    yield from _higher_zero_stages(config)
    yield _more_tensor_parallel(config, shape)
    if not on_cpu:  # where processes share one memory
        yield _more_devices(config)


def _other_caches(config: PPOConfig, on_cpu: bool) -> list[Overrides]:
    rollout = config.actor_rollout_ref.rollout
    if on_cpu:
        larger = [size for size in CACHE_SIZES if size > rollout.kv_cache_memory_gb]
        smaller = [size for size in reversed(CACHE_SIZES) if size < rollout.kv_cache_memory_gb]
        return [{CACHE_SIZE: size} for size in (*larger, *smaller)]
    return [{CACHE_SHARE: AUTO}] if rollout.gpu_memory_utilization != AUTO else []


def _smaller_micro_batches(config: PPOConfig, stage: str) -> Iterator[list[Overrides]]:
    """Those of the stage that bursts, then the others."""
    policy = config.actor_rollout_ref
    sizes = {
        ACTOR_MICRO: policy.actor.ppo_micro_batch_size_per_device,
        CRITIC_MICRO: config.critic.ppo_micro_batch_size_per_device if config.has_critic else 1,
        LOG_PROB_MICRO: policy.rollout.log_prob_micro_batch_size_per_device,
        REF_MICRO: policy.ref.log_prob_micro_batch_size_per_device if config.has_reference else 1,
        REWARD_MICRO: config.reward_model.micro_batch_size_per_device if config.reward_model.enable else 1,
    }
    for key in sorted(sizes, key=lambda name: name != MICRO_OF_STAGE.get(stage)):
        size = sizes[key]
        yield [{key: smaller} for smaller in range(size - 1, 0, -1) if size % smaller == 0]


def _higher_zero_stages(config: PPOConfig) -> Iterator[list[Overrides]]:
    policy = config.actor_rollout_ref
    yield [{ACTOR_ZERO: stage} for stage in range(policy.actor.zero_stage + 1, 4)]
    if config.has_critic:
        yield [{CRITIC_ZERO: stage} for stage in range(config.critic.zero_stage + 1, 4)]
    if config.has_reference and policy.ref.zero_stage == 0:
        yield [{REF_ZERO: 3}]
    if config.reward_model.enable and config.reward_model.zero_stage == 0:
        yield [{REWARD_ZERO: 3}]


def _more_tensor_parallel(config: PPOConfig, shape: ModelShape) -> list[Overrides]:
    now, most = config.actor_rollout_ref.rollout.tensor_model_parallel_size, config.trainer.n_devices_per_node
    return [{TENSOR_PARALLEL: size} for size in range(now + 1, most + 1) if shape.splits_over(size)]


def _more_devices(config: PPOConfig) -> list[Overrides]:
    devices, nodes = config.trainer.n_devices_per_node, config.trainer.nnodes
    steps: list[Overrides] = []
    while devices * 2 <= LARGEST_NODE:
        devices *= 2
        steps.append({DEVICES: devices})
    while nodes * 2 <= MOST_NODES:
        nodes *= 2
        steps.append({DEVICES: devices, NODES: nodes})
    return steps
