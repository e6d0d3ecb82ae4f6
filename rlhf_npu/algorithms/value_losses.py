"""Losses of the critic, and how well it predicts."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_npu.algorithms.aggregation import AllReduce, TokenLoss, identity, masked_sum


def clipped_value_loss(vpreds: Tensor, old_values: Tensor, returns: Tensor, cliprange: float) -> TokenLoss:
    """Half the squared error, clipped as PPO's authors do in code (Engstrom et al. 2020, arXiv 2005.12729).

    The loss is max((v - R)^2, (clip(v, v_old - cliprange, v_old + cliprange) - R)^2) / 2.

    Args:
        vpreds: (B, T) the critic's values; the gradient goes here.
        old_values: (B, T) its values before this step's updates.
        returns: (B, T) what it should have predicted.

    Returns:
        the loss, and the metric vf_clipfrac (1 where the clip decides).
    """
    clipped_values = old_values + (vpreds - old_values).clamp(-cliprange, cliprange)
    unclipped, clipped = (vpreds - returns).square(), (clipped_values - returns).square()
    loss = 0.5 * torch.maximum(unclipped, clipped)
    return TokenLoss(loss, {"vf_clipfrac": (clipped > unclipped).to(loss).detach()})


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, all_reduce: AllReduce = identity) -> float:
    """1 - Var(returns - values) / Var(returns) over all ranks' response tokens; tensors are (B, T).

    1 is a perfect critic, 0 is no better than a constant, and below 0 is worse. 0 where the returns do not
    vary.
    """
    count = all_reduce((mask != 0).sum().to(returns)).clamp(min=1)
    unexplained, total = (_squared_deviations(x, mask, count, all_reduce) for x in (returns - values, returns))
    return 1 - float(unexplained / total) if total > 0 else 0.0


def _squared_deviations(x: Tensor, mask: Tensor, count: Tensor, all_reduce: AllReduce) -> Tensor:
    mean = all_reduce(masked_sum(x, mask)) / count
    return all_reduce(masked_sum((x - mean).square(), mask))
