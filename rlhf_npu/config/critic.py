"""The value model, which exists if `algorithm.adv_estimator=gae`."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlhf_npu.config.actor_rollout_ref import LOSS_AGG_MODES, ZERO_STAGES
from rlhf_npu.config.keys import AT_LEAST_ONE, POSITIVE, ConfigNode, key
from rlhf_npu.config.optim import OptimConfig


@dataclass
class CriticModelConfig(ConfigNode):
    """The critic's start: a language model whose head is replaced by a value head."""

    path: str | None = key("model folder; null = the actor's", None, path=True)


@dataclass
class CriticConfig(ConfigNode):
    """The critic; its mini-batch is `actor_rollout_ref.actor.ppo_mini_batch_size`."""

    model: CriticModelConfig = field(default_factory=CriticModelConfig)
    ppo_micro_batch_size_per_device: int = key(
        "SEQUENCES a forward and backward pass, on one device", within=AT_LEAST_ONE
    )
    ppo_epochs: int = key("passes over each step's batch", 1, within=AT_LEAST_ONE)
    cliprange_value: float = key("a value moves this far from the old one at most", 0.5, within=POSITIVE)
    grad_clip: float = key("gradient norm at most", 1.0, within=POSITIVE)
    loss_agg_mode: str = key("how token losses become one number", "token-mean", choices=LOSS_AGG_MODES)
    zero_stage: int = key("DeepSpeed ZeRO stage", choices=ZERO_STAGES)
    optim: OptimConfig = field(default_factory=OptimConfig)
