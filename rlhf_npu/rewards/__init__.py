"""Reward functions: `load_reward` finds the configured one and checks what it returns."""

from rlhf_npu.rewards.loading import BUILTIN_REWARDS, RewardFunction, load_reward

__all__ = ["BUILTIN_REWARDS", "RewardFunction", "load_reward"]
