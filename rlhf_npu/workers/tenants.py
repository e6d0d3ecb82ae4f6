"""Everything that shares one device, and how it is built."""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from rlhf_npu.config import PPOConfig
from rlhf_npu.engines.models import load_critic, load_policy, load_tokenizer, stop_token_ids
from rlhf_npu.engines.rollout import RolloutEngine
from rlhf_npu.engines.trainer_engine import InferenceEngine, TrainerEngine
from rlhf_npu.hybrid.engine import HybridEngine
from rlhf_npu.hybrid.reshard import Resharder
from rlhf_npu.platform import Platform
from rlhf_npu.rewards import load_reward
from rlhf_npu.workers.critic import CriticTrainer
from rlhf_npu.workers.policy import PolicyTrainer
from rlhf_npu.workers.reference import Reference
from rlhf_npu.workers.scoring import Scorer

MIB = 1 << 20


@dataclass
class Tenants:
    """The engines of one device; `critic` and `reference` exist when the algorithm uses them."""

    tokenizer: PreTrainedTokenizerBase
    scorer: Scorer
    rollout: RolloutEngine
    policy: PolicyTrainer
    resharder: Resharder
    hybrid: HybridEngine
    critic: CriticTrainer | None
    reference: Reference | None


def build_tenants(config: PPOConfig, platform: Platform, optimizer_steps: tuple[int, int]) -> Tenants:
    """Build the rollout, put it to sleep while the trainers are built, and wake it."""
    model, rollout_config = config.actor_rollout_ref.model, config.actor_rollout_ref.rollout
    tokenizer = load_tokenizer(model)
    scorer = Scorer(load_reward(config.reward), tokenizer)
    rollout = RolloutEngine(model, rollout_config, config.data, platform, stop_token_ids(model, tokenizer))
    rollout.sleep(level=1)
    policy = _build_policy(config, platform, optimizer_steps[0])
    critic = _build_critic(config, platform, optimizer_steps[1]) if config.has_critic else None
    reference = _build_reference(config, platform) if config.has_reference else None
    rollout.wake_up(["weights", "kv_cache"])
    resharder = Resharder(policy.engine.module, rollout, rollout_config.reshard_bucket_mb * MIB)
    hybrid = HybridEngine(rollout, resharder, rollout_config.sleep_level, platform)
    return Tenants(tokenizer, scorer, rollout, policy, resharder, hybrid, critic, reference)


def _build_policy(config: PPOConfig, platform: Platform, optimizer_steps: int) -> PolicyTrainer:
    actor, model = config.actor_rollout_ref.actor, config.actor_rollout_ref.model
    engine = TrainerEngine(
        load_policy(model),
        actor.optim,
        zero_stage=actor.zero_stage,
        dtype=model.dtype,
        grad_clip=actor.grad_clip,
        optimizer_steps=optimizer_steps,
        platform=platform,
    )
    rollout = config.actor_rollout_ref.rollout
    return PolicyTrainer(engine, actor, rollout.temperature, config.data.max_response_length)


def _build_critic(config: PPOConfig, platform: Platform, optimizer_steps: int) -> CriticTrainer:
    model = config.actor_rollout_ref.model
    engine = TrainerEngine(
        load_critic(replace(model, path=config.critic.model.path or model.path)),
        config.critic.optim,
        zero_stage=config.critic.zero_stage,
        dtype=model.dtype,
        grad_clip=config.critic.grad_clip,
        optimizer_steps=optimizer_steps,
        platform=platform,
    )
    return CriticTrainer(engine, config.critic, config.data.max_response_length)


def _build_reference(config: PPOConfig, platform: Platform) -> Reference:
    model, ref = config.actor_rollout_ref.model, config.actor_rollout_ref.ref
    engine = InferenceEngine(load_policy(model), zero_stage=ref.zero_stage, dtype=model.dtype, platform=platform)
    return Reference(engine, ref, config.actor_rollout_ref.rollout.temperature)
