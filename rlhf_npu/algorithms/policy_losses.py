"""Policy losses, for each token."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_npu.algorithms.aggregation import TokenLoss

_MAX_LOG_RATIO = 20.0


def clipped_policy_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    clip_ratio_low: float,
    clip_ratio_high: float,
    clip_ratio_c: float,
) -> TokenLoss:
    """PPO's clipped surrogate (Schulman et al. 2017, arXiv 1707.06347, eq. 7), negated.

    With ratio r = exp(log_prob - old_log_prob) and advantage A the loss is
    -min(r A, clip(r, 1 - clip_ratio_low, 1 + clip_ratio_high) A), the two ratios as in DAPO (arXiv
    2503.14476). The dual clip (Ye et al. 2020, arXiv 1912.09729, eq. 5) keeps the loss at or below
    -clip_ratio_c A where A < 0. The log-ratio is held within +-20, where float32's exp is far from
    overflow; beyond it there is no gradient.

    Args:
        log_prob: (B, T) under the policy that is trained; the gradient goes here.
        old_log_prob: (B, T) under the policy before this step's updates.
        advantages: (B, T).
        clip_ratio_c: above 1, or 0 to leave the dual clip out.

    Returns:
        the loss, and metrics pg_clipfrac (1 where the clip decides), pg_clipfrac_lower (1 where the dual
        clip does) and ppo_kl (old_log_prob - log_prob).
    """
    log_ratio = log_prob - old_log_prob
    ratio = log_ratio.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_ratio_low, 1 + clip_ratio_high)
    loss = torch.maximum(unclipped, clipped)
    lower = torch.zeros_like(loss, dtype=torch.bool)
    if clip_ratio_c:
        bound = -advantages * clip_ratio_c
        lower = (advantages < 0) & (loss > bound)
        loss = torch.where(lower, bound, loss)
    metrics = {
        "pg_clipfrac": (clipped > unclipped).to(loss),
        "pg_clipfrac_lower": lower.to(loss),
        "ppo_kl": -log_ratio,
    }
    return TokenLoss(loss, {name: value.detach() for name, value in metrics.items()})
