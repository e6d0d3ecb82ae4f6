"""The roots of the configurations that learn from files alone: `main_sft`, `main_dpo` and `main_reward`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from rlhf_npu.config.actor_rollout_ref import ZERO_STAGES, ModelConfig
from rlhf_npu.config.keys import NOT_NEGATIVE, POSITIVE, ConfigNode, Problem, key
from rlhf_npu.config.offline_data import OfflineDataConfig
from rlhf_npu.config.optim import OptimConfig
from rlhf_npu.config.preference_loss import PreferenceLossConfig
from rlhf_npu.config.root import RootConfig
from rlhf_npu.config.trainer import TrainerConfig


@dataclass
class EngineConfig(ConfigNode):
    """How DeepSpeed trains the model."""

    zero_stage: int = key("DeepSpeed ZeRO stage", choices=ZERO_STAGES)
    grad_clip: float = key("gradient norm at most", 1.0, within=POSITIVE)


@dataclass
class OfflineConfig(RootConfig):
    """A run that learns from files."""

    data: OfflineDataConfig = field(default_factory=OfflineDataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    def relations(self) -> Iterator[Problem]:
        devices, batch = self.trainer.world_size, self.data.train_batch_size
        if batch % devices:
            below, above = batch // devices * devices, (batch // devices + 1) * devices
            nearest = " or ".join(str(size) for size in (below, above) if size)
            right = f"counts examples over all devices and must be a multiple of the {devices}; nearest: {nearest}"
            yield Problem("data.train_batch_size", batch, right)
        if self.engine.zero_stage == 0 and self.model.dtype == "bfloat16":
            right = "in bfloat16 DeepSpeed's stage 0 does not take the steps that fp32 or stages 1 to 3 take; set 1"
            yield Problem("engine.zero_stage", 0, right)


@dataclass
class SFTConfig(OfflineConfig):
    """Supervised fine-tuning: the mean negative log-likelihood of the trained tokens of a batch."""


@dataclass
class DPOConfig(OfflineConfig):
    """Training on preferences: pairs, or for KTO single answers."""

    loss: PreferenceLossConfig = field(default_factory=PreferenceLossConfig)


@dataclass
class RewardLossConfig(ConfigNode):
    """The loss of a Bradley-Terry reward model."""

    center_rewards_coefficient: float = key(
        "weight of (chosen + rejected)^2, which keeps rewards around 0", 0.0, within=NOT_NEGATIVE
    )


@dataclass
class RewardModelConfig(OfflineConfig):
    """A reward model that is trained on pairs."""

    loss: RewardLossConfig = field(default_factory=RewardLossConfig)
