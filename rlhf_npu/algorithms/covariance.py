"""Policy losses that treat a few tokens apart: those whose log-probability and advantage vary together the most.

A token's covariance is (log_prob - mean)(advantage - mean), with means over all tokens of the batch (Cui et al. 2025,
arXiv 2505.22617). Tokens with a high one are what makes the policy's entropy fall. Which tokens are chosen
depends on the whole batch, so the choice is made once for each mini-batch, over all micro-batches and ranks, with the
log-probabilities from before the step's updates. Then gradients do not depend on how the batch is cut.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_npu.algorithms.aggregation import Ranks, TokenLoss, masked_sum
from rlhf_npu.algorithms.token_ratios import PolicyInputs, clipped, ratio_of, token_loss
from rlhf_npu.config import ActorConfig


def clip_cov(inputs: PolicyInputs, config: ActorConfig) -> TokenLoss:
    """Clip-Cov (Cui et al. 2025, arXiv 2505.22617): PPO's clipped loss, 0 at the tokens that are chosen.

    Returns:
        the loss, and metrics pg_clipfrac (tokens that are chosen or clipped) and ppo_kl.
    """
    chosen = _chosen(inputs)
    loss, upper = clipped(ratio_of(inputs.log_ratio), inputs.advantages, config)
    return token_loss(loss.masked_fill(chosen, 0), inputs, pg_clipfrac=chosen | upper)


def kl_cov(inputs: PolicyInputs, config: ActorConfig) -> TokenLoss:
    """KL-Cov (Cui et al. 2025, arXiv 2505.22617): -r A, plus ppo_kl_coef |log r| at the tokens that are chosen.

    Returns:
        the loss, and metrics pg_clipfrac (tokens that are chosen) and ppo_kl.
    """
    chosen, log_ratio = _chosen(inputs), inputs.log_ratio
    penalty = config.policy_loss.ppo_kl_coef * log_ratio.abs().masked_fill(~chosen, 0)
    return token_loss(-inputs.advantages * ratio_of(log_ratio) + penalty, inputs, pg_clipfrac=chosen)


@torch.no_grad()
def choose_for_clip_cov(inputs: PolicyInputs, config: ActorConfig, ranks: Ranks) -> Tensor:
    """A share clip_cov_ratio of all tokens, at least one, drawn from those of covariance clip_cov_lb to clip_cov_ub.

    The draw is by a number that a token's own log-probability, advantage and place give, so it is the same wherever the
    token is. All are chosen if there are fewer.

    Args:
        inputs: of this rank's part of a mini-batch, `log_prob` being that from before the updates.

    Returns:
        (B, T), 1 at the chosen tokens.
    """
    loss = config.policy_loss
    covariance, tokens = _covariance(inputs, ranks)
    eligible = tokens & (covariance > loss.clip_cov_lb) & (covariance < loss.clip_cov_ub)
    lots = _lots(inputs).masked_fill(~eligible, -torch.inf)
    return _largest(lots, eligible, loss.clip_cov_ratio, tokens, ranks)


@torch.no_grad()
def choose_for_kl_cov(inputs: PolicyInputs, config: ActorConfig, ranks: Ranks) -> Tensor:
    """The share kl_cov_ratio of all tokens, at least one, whose covariance is the largest.

    Args:
        inputs: of this rank's part of a mini-batch, `log_prob` being that from before the updates.

    Returns:
        (B, T), 1 at the chosen tokens.
    """
    covariance, tokens = _covariance(inputs, ranks)
    covariance = covariance.masked_fill(~tokens, -torch.inf)
    return _largest(covariance, tokens, config.policy_loss.kl_cov_ratio, tokens, ranks)


TOKEN_CHOICES: dict[str, Callable[[PolicyInputs, ActorConfig, Ranks], Tensor]] = {
    "clip_cov": choose_for_clip_cov,
    "kl_cov": choose_for_kl_cov,
}
"""How the losses of this module choose their tokens."""


def _chosen(inputs: PolicyInputs) -> Tensor:
    if inputs.chosen is None:
        raise ValueError("clip_cov and kl_cov need the tokens that TOKEN_CHOICES chose in the whole mini-batch")
    return inputs.chosen != 0


def _covariance(inputs: PolicyInputs, ranks: Ranks) -> tuple[Tensor, Tensor]:
    tokens = inputs.mask != 0
    sums = [masked_sum(inputs.log_prob, inputs.mask), masked_sum(inputs.advantages, inputs.mask)]
    log_prob_sum, advantage_sum, count = ranks.all_reduce(torch.stack([*sums, tokens.sum().to(sums[0])]))
    count = count.clamp(min=1)
    return (inputs.log_prob - log_prob_sum / count) * (inputs.advantages - advantage_sum / count), tokens


def _largest(keys: Tensor, eligible: Tensor, ratio: float, tokens: Tensor, ranks: Ranks) -> Tensor:
    """1 at the eligible tokens whose key is among the largest, a share `ratio` of all ranks' tokens, at least one."""
    total = int(ranks.all_reduce(tokens.sum().to(keys)))
    count = max(1, int(ratio * total))
    flat = keys.flatten()
    own = flat.topk(min(count, flat.numel())).values
    padded = torch.cat([own, own.new_full((count - own.numel(),), -torch.inf)])
    bound = ranks.gather(padded).topk(count).values[-1]
    return (eligible & (keys >= bound)).to(keys)


def _lots(inputs: PolicyInputs) -> Tensor:
    """A number from 0 to 1 for each token: a hash of its log-probability, its advantage and its place, on the host."""
    floats = inputs.log_prob.float().cpu(), inputs.advantages.float().cpu()
    log_prob, advantage = (tensor.view(torch.int32).long() for tensor in floats)
    place = torch.arange(log_prob.shape[1])
    mixed = (log_prob ^ (advantage >> 7) ^ (place << 9)) & 0x7FFFFFFF
    return ((mixed * 2654435761 >> 17) & 0xFFFFFF).to(inputs.log_prob) / (1 << 24)
