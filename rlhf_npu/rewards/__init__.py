"""Reward functions: `load_reward` finds the configured one and checks what it returns."""

from rlhf_npu.rewards.contract import Graded, UngradableError
from rlhf_npu.rewards.loading import BUILTIN_REWARDS, RewardFunction, load_reward, load_sample_check

__all__ = ["BUILTIN_REWARDS", "Graded", "RewardFunction", "UngradableError", "load_reward", "load_sample_check"]
