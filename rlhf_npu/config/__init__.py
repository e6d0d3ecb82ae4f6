"""Typed configuration: the schema behind `configs/`, its checks, and the arithmetic of a batch."""

from rlhf_npu.config.actor_rollout_ref import (
    ActorConfig,
    ActorRolloutRefConfig,
    ModelConfig,
    RefConfig,
    RolloutConfig,
    ValKwargsConfig,
)
from rlhf_npu.config.algorithm import AlgorithmConfig, KLControlConfig
from rlhf_npu.config.batch_math import BatchMath
from rlhf_npu.config.command_line import run_from_command_line
from rlhf_npu.config.compose import compose_config
from rlhf_npu.config.critic import CriticConfig, CriticModelConfig
from rlhf_npu.config.data import DataConfig
from rlhf_npu.config.hybrid import HybridConfig
from rlhf_npu.config.offline import DPOConfig, OfflineConfig, RewardLossConfig, RewardModelConfig, SFTConfig
from rlhf_npu.config.offline_data import OfflineDataConfig
from rlhf_npu.config.optim import OptimConfig
from rlhf_npu.config.policy_loss import PolicyLossConfig
from rlhf_npu.config.ppo import PPOConfig
from rlhf_npu.config.preference_loss import PreferenceLossConfig
from rlhf_npu.config.reward import OverlongBufferConfig, RewardConfig
from rlhf_npu.config.reward_model import ScoringConfig
from rlhf_npu.config.rollout_correction import RolloutCorrectionConfig
from rlhf_npu.config.root import RootConfig
from rlhf_npu.config.schema import DPO, PPO, REWARD, SFT, Schema
from rlhf_npu.config.trainer import PPOTrainerConfig, TrainerConfig

__all__ = [
    "DPO",
    "PPO",
    "REWARD",
    "SFT",
    "ActorConfig",
    "ActorRolloutRefConfig",
    "AlgorithmConfig",
    "BatchMath",
    "CriticConfig",
    "CriticModelConfig",
    "DPOConfig",
    "DataConfig",
    "HybridConfig",
    "KLControlConfig",
    "ModelConfig",
    "OfflineConfig",
    "OfflineDataConfig",
    "OptimConfig",
    "OverlongBufferConfig",
    "PPOConfig",
    "PPOTrainerConfig",
    "PolicyLossConfig",
    "PreferenceLossConfig",
    "RefConfig",
    "RewardConfig",
    "RewardLossConfig",
    "RewardModelConfig",
    "RolloutConfig",
    "RolloutCorrectionConfig",
    "RootConfig",
    "SFTConfig",
    "Schema",
    "ScoringConfig",
    "TrainerConfig",
    "ValKwargsConfig",
    "compose_config",
    "run_from_command_line",
]
