"""Reward functions: `load_reward` finds the configured one and checks what it returns."""

from rlhf_npu.rewards.contract import Graded, Response, UngradableError, numeric_parts
from rlhf_npu.rewards.grading import RewardFunction
from rlhf_npu.rewards.loading import BUILTIN_REWARDS, load_reward, load_sample_check

__all__ = [
    "BUILTIN_REWARDS",
    "Graded",
    "Response",
    "RewardFunction",
    "UngradableError",
    "load_reward",
    "load_sample_check",
    "numeric_parts",
]
