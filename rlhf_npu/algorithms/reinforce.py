"""Estimators in REINFORCE's line: a return less a baseline that is no critic, normalized over the whole batch."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_npu.algorithms.aggregation import masked_whiten
from rlhf_npu.algorithms.estimates import AdvantageInputs, Advantages, sequence_rewards, spread
from rlhf_npu.algorithms.gae import at_tokens, lambda_returns, row_blocks
from rlhf_npu.algorithms.group_advantages import groups_of
from rlhf_npu.config import AlgorithmConfig


@torch.no_grad()
def reinforce_plus_plus(inputs: AdvantageInputs, config: AlgorithmConfig) -> Advantages:
    """REINFORCE++ (Hu et al. 2025, arXiv 2501.03262).

    The return of a token is the discounted sum of the rewards from it on, and its advantage that return whitened over
    all response tokens of the batch, on all ranks. Tokens that the mask leaves out take no time.
    """
    returns = discounted_returns(inputs, config.gamma)
    return Advantages(masked_whiten(returns, inputs.response_mask, all_reduce=inputs.all_reduce), returns)


@torch.no_grad()
def reinforce_plus_plus_baseline(inputs: AdvantageInputs, config: AlgorithmConfig) -> Advantages:  # noqa: ARG001
    """REINFORCE++-baseline (Hu et al. 2025, arXiv 2501.03262).

    A response's reward less its group's mean, at each of its tokens, whitened over all response tokens of the batch, on
    all ranks.
    """
    groups = groups_of(inputs, "reinforce_plus_plus_baseline")
    rewards = sequence_rewards(inputs)
    centred = spread(rewards - groups.mean(rewards), inputs)
    advantages = masked_whiten(centred, inputs.response_mask, all_reduce=inputs.all_reduce)
    return Advantages(advantages, advantages)


@torch.no_grad()
def remax(inputs: AdvantageInputs, config: AlgorithmConfig) -> Advantages:  # noqa: ARG001
    """ReMax (Li et al. 2023, arXiv 2310.10505).

    The return of a token is the sum of the rewards from it on, its advantage that return less the reward of the greedy
    response to the same prompt.
    """
    if inputs.baselines is None:
        raise ValueError("remax needs baselines, the rewards of the greedy responses")
    returns = discounted_returns(inputs, gamma=1.0)
    return Advantages(returns - spread(inputs.baselines, inputs), returns)


def discounted_returns(inputs: AdvantageInputs, gamma: float) -> Tensor:
    """R_t = r_t + gamma R_{t+1}, (B, T), from one response token to the next; 0 elsewhere."""
    returns = torch.empty_like(inputs.token_level_rewards)
    for rows in row_blocks(returns):
        tokens = inputs.response_mask[rows] != 0
        rewards = at_tokens(inputs.token_level_rewards[rows], tokens)
        returns[rows] = lambda_returns(rewards, rewards, tokens, gamma, lam=1.0)
    return returns
