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
from rlhf_npu.config.optim import OptimConfig
from rlhf_npu.config.ppo import PPOConfig
from rlhf_npu.config.reward import RewardConfig
from rlhf_npu.config.trainer import TrainerConfig

__all__ = [
    "ActorConfig",
    "ActorRolloutRefConfig",
    "AlgorithmConfig",
    "BatchMath",
    "CriticConfig",
    "CriticModelConfig",
    "DataConfig",
    "KLControlConfig",
    "ModelConfig",
    "OptimConfig",
    "PPOConfig",
    "RefConfig",
    "RewardConfig",
    "RolloutConfig",
    "TrainerConfig",
    "ValKwargsConfig",
    "compose_config",
    "run_from_command_line",
]
