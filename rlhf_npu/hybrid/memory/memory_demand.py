"""What a run asks of one device: bytes of each tag, and what each stage takes beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from rlhf_npu.config import PPOConfig
from rlhf_npu.hybrid.memory.activation_memory import (
    LOG_PROBS,
    NO_LOGITS,
    POLICY_LOSS,
    POLICY_LOSS_WITH_ENTROPY,
    MicroBatch,
    Moments,
    forward_bytes,
    training_bytes,
)
from rlhf_npu.hybrid.memory.model_shape import ModelShape
from rlhf_npu.hybrid.memory.rollout_memory import (
    RolloutDemand,
    generation_bytes,
    least_cache_bytes,
    useful_cache_bytes,
    weight_bytes,
)
from rlhf_npu.hybrid.memory.shared_weights import SharedWeights, foretell_sharing
from rlhf_npu.hybrid.memory.trainer_memory import TrainerBytes, frozen_bytes, trainer_bytes
from rlhf_npu.hybrid.switch_plan import Policy, Stage, Tag
from rlhf_npu.hybrid.tags import make_tags
from rlhf_npu.platform import Platform

GIB = 1 << 30
MIB = 1 << 20
RUNTIME_BYTES = {"cuda": 2 * GIB, "npu": 3 * GIB // 2}
"""Of an accelerator that driver and libraries take; 2.3 GiB were seen on an H200, a second process's among them."""
COLLECTIVES_BYTES = {"cuda": 3 * GIB, "npu": 0}
"""Of a device that collectives take where there are several; on each of two H200s 3.3 GiB more were seen."""
GRAPH_BYTES = GIB
"""Of captured graphs, which stay while the rollout sleeps."""


@dataclass(frozen=True)
class Device:
    """A device as far as memory is concerned.

    Attributes:
        name: of its platform: "cpu", "cuda" or "npu".
        total: bytes that it has.
        capacity: bytes of them that may be used.
    """

    name: str
    total: int
    capacity: int


@dataclass(frozen=True)
class Models:
    """The shapes of the policy, of the language model that the critic is made of, and of the reward model, if any."""

    policy: ModelShape
    critic: ModelShape
    reward: ModelShape | None = None


@dataclass(frozen=True)
class Surplus:
    """Bytes on one device that a run was seen to take beyond what was predicted.

    Attributes:
        tags: by their names.
        workspace: beside the tags.
    """

    tags: Mapping[str, int] = field(default_factory=dict)
    workspace: Mapping[Stage, int] = field(default_factory=dict)


@dataclass(frozen=True)
class MemoryDemand:
    """Bytes on one device.

    Attributes:
        tags: the pool's tenants.
        workspace: what each stage takes beside them.
        kv_cache_bytes: of the tag `kv_cache`.
        least_cache_bytes: with less than that vLLM does not start.
        sharing: what of the actor's parameters the rollout generates with.
    """

    tags: tuple[Tag, ...]
    workspace: dict[Stage, int]
    kv_cache_bytes: int
    least_cache_bytes: int
    sharing: SharedWeights

    def with_surplus(self, surplus: Surplus) -> MemoryDemand:
        """The demand of a run of which more was seen than was predicted."""
        tags = tuple(replace(tag, bytes=tag.bytes + surplus.tags.get(tag.name, 0)) for tag in self.tags)
        workspace = {stage: size + surplus.workspace.get(stage, 0) for stage, size in self.workspace.items()}
        return replace(self, tags=tags, workspace=workspace)


def device_of(config: PPOConfig, platform: Platform) -> Device:
    """The device that `config` runs on; on the CPU an equal share of the machine's memory.

    Raises:
        DeviceError: the driver does not say how much memory it has.
    """
    limit = config.hybrid.device_memory_gb
    if limit is not None and platform.name == "cpu":
        return Device(platform.name, int(limit * GIB), int(limit * GIB))
    total = platform.memory_bytes()
    if platform.name == "cpu":
        total //= config.trainer.n_devices_per_node
    return Device(platform.name, total, total if limit is None else int(limit * GIB))


def memory_demand(config: PPOConfig, models: Models, device: Device) -> MemoryDemand:
    """What `config` asks of `device`."""
    states = _states(config, models, device)
    workspace = _workspace(config, models, device, states)
    rollout = rollout_demand(config)
    sharing = foretell_sharing(config, models.policy, _item_bytes(config))
    weights = weight_bytes(models.policy, rollout) - sharing.shared
    trainers = {
        f"{role}.{part}": size
        for role, held in states.items()
        for part, size in (("params", held.params), ("grads", held.grads), ("optimizer", held.optimizer))
        if size
    }
    # vLLM makes what it shares, and takes it for its own.
    rollouts_own = weights + workspace[Stage.GENERATE] + (states["actor"].params if sharing.shared else 0)
    beside = rollouts_own
    if config.hybrid.plan == Policy.KEEP.value:
        beside = weights + workspace[Stage.GENERATE] + sum(trainers.values())
    useful = useful_cache_bytes(models.policy, rollout)
    cache = max(0, _cache_bytes(config, device, beside, rollouts_own, useful))
    sizes = {"weights": weights, "kv_cache": cache, **trainers}
    tags = make_tags(sizes, str(config.actor_rollout_ref.rollout.sleep_level), sharing.shared > 0)
    return MemoryDemand(tags, workspace, cache, least_cache_bytes(models.policy, rollout), sharing)


def rollout_demand(config: PPOConfig) -> RolloutDemand:
    """What is asked of one rollout engine."""
    rollout = config.actor_rollout_ref.rollout
    return RolloutDemand(
        tensor_parallel=rollout.tensor_model_parallel_size,
        item_bytes=_item_bytes(config),
        sequences=rollout.max_num_seqs,
        length=config.data.max_prompt_length + config.data.max_response_length,
    )


def _cache_bytes(config: PPOConfig, device: Device, beside: int, rollouts_own: int, useful: int) -> int:
    """Bytes of the KV cache: as configured, or what is left while the rollout generates, as far as it is of use.

    Args:
        beside: bytes that are on the device with it.
        rollouts_own: those of them that vLLM counts as its own.
    """
    rollout = config.actor_rollout_ref.rollout
    if device.name == "cpu":
        return int(rollout.kv_cache_memory_gb * GIB)
    if isinstance(rollout.gpu_memory_utilization, str):
        return min(useful, (device.capacity - beside) // MIB * MIB)
    return int(rollout.gpu_memory_utilization * device.total) - rollouts_own


def _item_bytes(config: PPOConfig) -> int:
    dtype: torch.dtype = getattr(torch, config.actor_rollout_ref.model.dtype)
    return dtype.itemsize


def _states(config: PPOConfig, models: Models, device: Device) -> dict[str, TrainerBytes]:
    """What each model that is trained or asked holds, by its role."""
    policy, item, world = config.actor_rollout_ref, _item_bytes(config), config.trainer.world_size
    fused = device.name == "cuda"
    states = {
        "actor": trainer_bytes(
            models.policy.elements, zero_stage=policy.actor.zero_stage, item_bytes=item, world=world, fused=fused
        )
    }
    if config.has_critic:
        states["critic"] = trainer_bytes(
            models.critic.value_elements, zero_stage=config.critic.zero_stage, item_bytes=item, world=world, fused=fused
        )
    if config.has_reference:
        states["ref"] = frozen_bytes(
            models.policy.elements, zero_stage=policy.ref.zero_stage, item_bytes=item, world=world
        )
    if models.reward is not None:
        states["reward"] = frozen_bytes(
            models.reward.elements, zero_stage=config.reward_model.zero_stage, item_bytes=item, world=world
        )
    return states


def _workspace(config: PPOConfig, models: Models, device: Device, states: dict[str, TrainerBytes]) -> dict[Stage, int]:
    policy, actor = config.actor_rollout_ref, states["actor"]
    critic_micro = config.critic.ppo_micro_batch_size_per_device
    log_prob_micro = policy.rollout.log_prob_micro_batch_size_per_device
    loss = POLICY_LOSS_WITH_ENTROPY if policy.actor.entropy_coeff else POLICY_LOSS
    beside = {
        Stage.GENERATE: generation_bytes(models.policy, rollout_demand(config), device.total),
        Stage.LOG_PROB: actor.gathered + _asking(config, models.policy, log_prob_micro, logits=LOG_PROBS),
        Stage.TRAIN_ACTOR: _training(
            config, models.policy, actor, policy.actor.ppo_micro_batch_size_per_device, logits=loss
        ),
        Stage.RESHARD: _gathered_for_transfer(config, models.policy),
        Stage.SAVE: _gathered_for_transfer(config, models.policy),
    }
    if config.has_critic:
        critic = states["critic"]
        beside[Stage.VALUES] = critic.gathered + _asking(config, models.critic, critic_micro, logits=NO_LOGITS)
        beside[Stage.TRAIN_CRITIC] = _training(config, models.critic, critic, critic_micro, logits=NO_LOGITS)
    if config.has_reference:
        micro = policy.ref.log_prob_micro_batch_size_per_device
        beside[Stage.REF] = states["ref"].gathered + _asking(config, models.policy, micro, logits=LOG_PROBS)
    if models.reward is not None:
        micro = config.reward_model.micro_batch_size_per_device
        asking = _asking(config, models.reward, micro, logits=NO_LOGITS)
        beside[Stage.REWARD_MODEL] = states["reward"].gathered + asking
    always = _always(config, device)
    return {stage: size + always for stage, size in beside.items()}


def _always(config: PPOConfig, device: Device) -> int:
    """What an accelerator's software takes in every stage."""
    if device.name == "cpu":
        return 0
    graphs = 0 if config.actor_rollout_ref.rollout.enforce_eager else GRAPH_BYTES
    collectives = COLLECTIVES_BYTES[device.name] if config.trainer.world_size > 1 else 0
    return RUNTIME_BYTES[device.name] + graphs + collectives


def _gathered_for_transfer(config: PPOConfig, shape: ModelShape) -> int:
    """ZeRO-3's shards on their way to rollout or disk: a pair of buckets, or a parameter that is larger than both."""
    if config.actor_rollout_ref.actor.zero_stage != 3:
        return 0
    return max(2 * config.actor_rollout_ref.rollout.reshard_bucket_mb * MIB, shape.largest * _item_bytes(config))


def _training(config: PPOConfig, shape: ModelShape, states: TrainerBytes, micro: int, logits: Moments) -> int:
    """The larger of a pass with gradients, and the optimizer's step."""
    checkpointing = config.actor_rollout_ref.model.enable_gradient_checkpointing
    batch = _micro_batch(config, shape, micro)
    passes = training_bytes(shape, batch, checkpointing=checkpointing, logits=logits)
    return max(passes + states.gathered + states.backward, states.step)


def _asking(config: PPOConfig, shape: ModelShape, micro: int, logits: Moments) -> int:
    return forward_bytes(shape, _micro_batch(config, shape, micro), logits=logits)


def _micro_batch(config: PPOConfig, shape: ModelShape, micro: int) -> MicroBatch:
    attention = config.actor_rollout_ref.model.attn_implementation
    return MicroBatch(
        sequences=min(micro, config.batch_math.sequences_per_device),
        prompt=config.data.max_prompt_length,
        response=config.data.max_response_length,
        item_bytes=_item_bytes(config),
        eager_attention=attention == "eager" or (attention == "auto" and shape.caps_scores),
    )
