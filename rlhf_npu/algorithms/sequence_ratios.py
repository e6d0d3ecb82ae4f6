"""Policy losses of one probability ratio a response.

Both are (B, T), the response's value at each of its tokens, so that with loss_agg_mode=seq-mean-token-mean each
response counts once, as in the papers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_npu.algorithms.aggregation import TokenLoss
from rlhf_npu.algorithms.token_ratios import PolicyInputs, clipped, ratio_of, token_loss
from rlhf_npu.config import ActorConfig


def gspo(inputs: PolicyInputs, config: ActorConfig) -> TokenLoss:
    """Group sequence policy optimization (Zheng et al. 2025, arXiv 2507.18071, eq. 5, 7 and 13), negated.

    The ratio s of a response is the geometric mean of its tokens' ratios, clipped as PPO's. It is written as
    s_t = sg(s) pi_t / sg(pi_t), the paper's GSPO-token: where all tokens of a response have the same advantage value
    and gradient are GSPO's, and where they have not each token keeps its own.
    """
    length_mean = _mean_over_tokens(inputs.log_ratio.detach(), inputs.mask)
    own = inputs.log_prob - inputs.log_prob.detach()
    loss, upper = clipped(ratio_of(own + length_mean), inputs.advantages, config)
    return token_loss(loss, inputs, pg_clipfrac=upper)


def geo_mean(inputs: PolicyInputs, config: ActorConfig) -> TokenLoss:
    """Geometric-mean policy optimization (Zhao et al. 2025, arXiv 2507.20673), negated.

    -A exp(mean_t l_t) with each token's log-ratio l clipped to [-clip_ratio_low, clip_ratio_high] (the ratio to
    [e^-low, e^high]) on the side on which PPO clips, and A the mean of the response's advantages.

    Returns:
        the loss, and metrics pg_clipfrac (tokens with A > 0 whose log-ratio is outside the bounds), pg_clipfrac_lower
        (the same for A < 0) and ppo_kl.
    """
    log_ratio, sign = inputs.log_ratio, inputs.advantages.sign()
    bound = log_ratio.clamp(-config.clip_ratio_low, config.clip_ratio_high)
    pessimistic = sign * torch.minimum(sign * log_ratio, sign * bound)
    ratio = ratio_of(_mean_over_tokens(pessimistic, inputs.mask))
    loss = (-_mean_over_tokens(inputs.advantages, inputs.mask) * ratio).expand_as(log_ratio)
    outside = bound != log_ratio
    return token_loss(loss, inputs, pg_clipfrac=outside & (sign > 0), pg_clipfrac_lower=outside & (sign < 0))


def _mean_over_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """Each response's mean, (B, 1); 0 where it has no token."""
    tokens = mask != 0
    return values.masked_fill(~tokens, 0).sum(1, keepdim=True) / tokens.sum(1, keepdim=True).clamp(min=1)
