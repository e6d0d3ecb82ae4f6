"""Everything that shares one device, and how it is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from allocator import SleepPool
from rlhf_npu.config import PPOConfig
from rlhf_npu.engines.model_fit import POLICY, build_skeleton, quiet
from rlhf_npu.engines.models import (
    load_critic,
    load_policy,
    load_reward_model,
    load_tokenizer,
    read_tokenizer,
    stop_token_ids,
)
from rlhf_npu.engines.reward_model_fit import conversations_of, scoring_model
from rlhf_npu.engines.rollout import RolloutEngine
from rlhf_npu.engines.shared_storage import SharedStorage
from rlhf_npu.engines.trainer_engine import InferenceEngine, TrainerEngine
from rlhf_npu.hybrid.calibration import Calibration
from rlhf_npu.hybrid.engine import HybridEngine
from rlhf_npu.hybrid.measured_plan import measured_plan
from rlhf_npu.hybrid.memory.memory_plan import MemoryPlan
from rlhf_npu.hybrid.memory.shared_weights import cannot_share
from rlhf_npu.hybrid.resharding.reshard import Resharder
from rlhf_npu.hybrid.resharding.shared_layout import WeightSharing
from rlhf_npu.hybrid.switch_plan import Fate, Stage, SwitchPlan
from rlhf_npu.hybrid.tags import ROLLOUT_TAGS, SHARED_TAG
from rlhf_npu.platform import Platform
from rlhf_npu.rewards import load_reward
from rlhf_npu.roles.critic import CriticTrainer
from rlhf_npu.roles.policy import PolicyTrainer
from rlhf_npu.roles.reference import Reference
from rlhf_npu.roles.reward_model import RewardModel
from rlhf_npu.roles.scoring import Scorer

MIB = 1 << 20


@dataclass
class Tenants:
    """The engines of one device; `critic`, `reference` and `reward_model` exist when they are used."""

    tokenizer: PreTrainedTokenizerBase
    scorer: Scorer
    rollout: RolloutEngine
    policy: PolicyTrainer
    hybrid: HybridEngine
    critic: CriticTrainer | None
    reference: Reference | None
    reward_model: RewardModel | None


def build_tenants(
    config: PPOConfig, platform: Platform, optimizer_steps: tuple[int, int], memory: MemoryPlan
) -> Tenants:
    """Build the rollout and the trainers, each while those before it sleep that would otherwise be in its way.

    Raises:
        PlanError: what they hold does not fit.
    """
    model, rollout_config = config.actor_rollout_ref.model, config.actor_rollout_ref.rollout
    tokenizer = load_tokenizer(model)
    reward, scoring = config.reward, config.reward_model
    functions = load_reward(reward, scoring.weight if scoring.enable else None)
    scorer = Scorer(functions, tokenizer, reward.max_failed_ratio, config.trainer.world_size)
    stops = stop_token_ids(model, tokenizer)
    sharing = _weight_sharing(config)
    rollout = RolloutEngine(
        model,
        rollout_config,
        config.data,
        platform,
        stops,
        kv_cache_bytes=memory.kv_cache_bytes,
        reads_weights=False,
        lay_out=sharing.lay_out if sharing else None,
    )
    storage = sharing.storage_of(rollout) if sharing else None
    rollout.sleep(level=2)  # it has no weights yet that must survive
    asleep = _AsleepWhileBuilding(memory.switch_plan, platform)
    policy = _build_policy(config, platform, optimizer_steps[0], storage)
    asleep.put(policy.engine.tags)
    critic = _build_critic(config, platform, optimizer_steps[1]) if config.has_critic else None
    asleep.put(critic.engine.tags if critic else ())
    reference = _build_reference(config, platform) if config.has_reference else None
    asleep.put(reference.engine.tags if reference else ())
    reward_model = _build_reward_model(config, tokenizer, platform) if scoring.enable else None
    asleep.put(reward_model.engine.tags if reward_model else ())
    built = {"actor": policy, "critic": critic, "ref": reference, "reward": reward_model}
    trainers = {role: tenant.engine for role, tenant in built.items() if tenant is not None}
    tags = [*ROLLOUT_TAGS, *(tag for engine in trainers.values() for tag in engine.tags)]
    plan = measured_plan(config, tags, memory.workspace, memory.capacity, platform, shares_weights=storage is not None)
    resharder = Resharder(policy.engine.module, rollout, rollout_config.reshard_bucket_mb * MIB, storage)
    calibration = Calibration(platform) if config.hybrid.plan == "auto" and platform.name != "cpu" else None
    hybrid = HybridEngine(rollout, resharder, trainers, plan, platform, calibration)
    return Tenants(tokenizer, scorer, rollout, policy, hybrid, critic, reference, reward_model)


class _AsleepWhileBuilding:
    """Puts what was built to sleep if it will be while the rollout generates."""

    def __init__(self, plan: SwitchPlan, platform: Platform) -> None:
        self._fates = {tag.name: tag.fate for tag in plan.tags if tag.name not in plan.awake[Stage.GENERATE]}
        self._pool = SleepPool.get(platform.device())

    def put(self, tags: Sequence[str]) -> None:
        self._pool.sleep(
            offload=[tag for tag in tags if self._fates.get(tag) is Fate.OFFLOAD],
            discard=[tag for tag in tags if self._fates.get(tag) is Fate.DISCARD],
        )


def _weight_sharing(config: PPOConfig) -> WeightSharing | None:
    """What lays out the weights that trainer and rollout share; None where they can share none."""
    if cannot_share(config):
        return None
    model = config.actor_rollout_ref.model
    with quiet():
        policy = build_skeleton(model, POLICY, AutoModelForCausalLM).module
    return WeightSharing(policy, getattr(torch, model.dtype), config.trainer.world_size, SHARED_TAG)


def _build_policy(
    config: PPOConfig, platform: Platform, optimizer_steps: int, storage: SharedStorage | None
) -> PolicyTrainer:
    actor, model = config.actor_rollout_ref.actor, config.actor_rollout_ref.model
    engine = TrainerEngine(
        load_policy(model, zero_stage=actor.zero_stage, device=platform.device()),
        actor.optim,
        zero_stage=actor.zero_stage,
        dtype=model.dtype,
        grad_clip=actor.grad_clip,
        optimizer_steps=optimizer_steps,
        platform=platform,
        role="actor",
        storage=storage,
    )
    rollout = config.actor_rollout_ref.rollout
    return PolicyTrainer(engine, actor, rollout.temperature, config.data.max_response_length)


def _build_critic(config: PPOConfig, platform: Platform, optimizer_steps: int) -> CriticTrainer:
    model = config.actor_rollout_ref.model
    trunk = replace(model, path=config.critic.model.path or model.path)
    engine = TrainerEngine(
        load_critic(trunk, zero_stage=config.critic.zero_stage, device=platform.device()),
        config.critic.optim,
        zero_stage=config.critic.zero_stage,
        dtype=model.dtype,
        grad_clip=config.critic.grad_clip,
        optimizer_steps=optimizer_steps,
        platform=platform,
        role="critic",
    )
    return CriticTrainer(engine, config.critic, config.data.max_response_length)


def _build_reference(config: PPOConfig, platform: Platform) -> Reference:
    model, ref = config.actor_rollout_ref.model, config.actor_rollout_ref.ref
    policy = load_policy(model, zero_stage=ref.zero_stage, device=platform.device())
    engine = InferenceEngine(policy, zero_stage=ref.zero_stage, dtype=model.dtype, platform=platform, role="ref")
    return Reference(engine, ref, config.actor_rollout_ref.rollout.temperature)


def _build_reward_model(config: PPOConfig, policys: PreTrainedTokenizerBase, platform: Platform) -> RewardModel:
    model, stage = scoring_model(config), config.reward_model.zero_stage
    classifier = load_reward_model(model, zero_stage=stage, device=platform.device())
    engine = InferenceEngine(classifier, zero_stage=stage, dtype=model.dtype, platform=platform, role="reward")
    conversations = conversations_of(classifier.config, read_tokenizer(model), policys)
    micro_size = config.reward_model.micro_batch_size_per_device
    return RewardModel(engine, classifier, conversations, micro_size, platform.device())
