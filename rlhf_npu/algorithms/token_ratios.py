"""Policy losses of each token's own probability ratio."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_npu.algorithms.aggregation import TokenLoss
from rlhf_npu.config import ActorConfig

MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class PolicyInputs:
    """What policy losses may use of a micro-batch of B sequences and T response positions.

    Attributes:
        log_prob: (B, T) under the policy that is trained; the gradient goes here.
        old_log_prob: (B, T) under the policy before this step's updates.
        advantages: (B, T).
        mask: (B, T), 1 at the response tokens that are trained on. What the losses say of others is ignored.
        chosen: (B, T), 1 at the tokens that `covariance.TOKEN_CHOICES` chose; None for losses that choose none.
    """

    log_prob: Tensor
    old_log_prob: Tensor
    advantages: Tensor
    mask: Tensor
    chosen: Tensor | None = None

    @property
    def log_ratio(self) -> Tensor:
        """log_prob - old_log_prob, (B, T)."""
        return self.log_prob - self.old_log_prob


def ratio_of(log_ratio: Tensor) -> Tensor:
    """exp(log_ratio), which is held within +-20: float32's exp is far from overflow there, and no gradient beyond."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def token_loss(loss: Tensor, inputs: PolicyInputs, **metrics: Tensor) -> TokenLoss:
    """A loss with its metrics and `ppo_kl`, (B, T) each: old_log_prob - log_prob."""
    named = {name: value.detach().to(loss) for name, value in metrics.items()}
    return TokenLoss(loss, {**named, "ppo_kl": -inputs.log_ratio.detach()})


def clipped(ratio: Tensor, advantages: Tensor, config: ActorConfig) -> tuple[Tensor, Tensor]:
    """max(-r A, -clip(r, 1 - clip_ratio_low, 1 + clip_ratio_high) A), and where the clip decides; both (B, T)."""
    free = -advantages * ratio
    bound = -advantages * ratio.clamp(1 - config.clip_ratio_low, 1 + config.clip_ratio_high)
    return torch.maximum(free, bound), bound > free


def vanilla(inputs: PolicyInputs, config: ActorConfig) -> TokenLoss:
    """PPO's clipped surrogate (Schulman et al. 2017, arXiv 1707.06347, eq. 7), negated.

    With ratio r = exp(log_prob - old_log_prob) and advantage A the loss is
    -min(r A, clip(r, 1 - clip_ratio_low, 1 + clip_ratio_high) A), the two ratios as in DAPO (arXiv
    2503.14476). The dual clip (Ye et al. 2020, arXiv 1912.09729, eq. 5) keeps the loss at or below
    -clip_ratio_c A where A < 0; clip_ratio_c = 0 leaves it out.

    Returns:
        the loss, and metrics pg_clipfrac (1 where the clip decides), pg_clipfrac_lower (1 where the dual
        clip does) and ppo_kl (old_log_prob - log_prob).
    """
    loss, upper = clipped(ratio_of(inputs.log_ratio), inputs.advantages, config)
    lower = torch.zeros_like(upper)
    if config.clip_ratio_c:
        bound = -inputs.advantages * config.clip_ratio_c
        lower = (inputs.advantages < 0) & (loss > bound)
        loss = torch.where(lower, bound, loss)
    return token_loss(loss, inputs, pg_clipfrac=upper, pg_clipfrac_lower=lower)


def cispo(inputs: PolicyInputs, config: ActorConfig) -> TokenLoss:
    """Clipped importance weights (MiniMax 2025, arXiv 2506.13585), negated.

    -sg(clip(r, 1 - clip_ratio_low, 1 + clip_ratio_high)) A log_prob: the weight is clipped and carries no gradient, so
    that every token keeps one. clip_ratio_low = 1 sets no lower bound, as in the paper.
    """
    ratio = ratio_of(inputs.log_ratio.detach())
    weight = ratio.clamp(1 - config.clip_ratio_low, 1 + config.clip_ratio_high)
    return token_loss(-weight * inputs.advantages * inputs.log_prob, inputs, pg_clipfrac=weight != ratio)


def sapo(inputs: PolicyInputs, config: ActorConfig) -> TokenLoss:
    """Soft adaptive policy optimization (Gao et al. 2025, arXiv 2511.20347), negated.

    -(4 / tau) sigmoid(tau (r - 1)) A with tau = tau_pos where A > 0 and tau_neg elsewhere: instead of a clip, a gate
    whose slope is 1 at r = 1 and falls on both sides.
    """
    positive = inputs.advantages > 0
    tau = torch.where(positive, config.tau_pos, config.tau_neg).to(inputs.advantages)
    gate = torch.sigmoid(tau * (ratio_of(inputs.log_ratio) - 1)) * 4 / tau
    return token_loss(-gate * inputs.advantages, inputs)


def gpg(inputs: PolicyInputs, config: ActorConfig) -> TokenLoss:  # noqa: ARG001
    """The plain policy gradient (Chu et al. 2025, arXiv 2504.02546), negated: -A log_prob.

    It knows no ratio, so it is exact for one optimizer step on each batch.
    """
    return token_loss(-inputs.advantages * inputs.log_prob, inputs)
