"""KL divergence from a reference policy: estimators for each token, and controllers of the coefficient.

The estimators are Schulman's (2020, http://joschu.net/blog/kl-approx.html) of KL(policy || reference) from
tokens that the policy sampled. As a value, k1 and k3 are unbiased; k2 and k3 are never negative. As a loss
they differ, because the gradient of an estimator is not an estimator of the gradient: for tokens sampled
from the policy itself, k1's expected gradient is 0, k2's is that of KL(policy || reference), and k3's is
that of KL(reference || policy). So k1+ and k3+ have the value of k1 and k3 and the gradient of k2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rlhf_npu.config import KLControlConfig

_MAX_LOG_RATIO = 20.0


def k1(log_prob: Tensor, ref_log_prob: Tensor) -> Tensor:
    """log_prob - ref_log_prob, (B, T)."""
    return log_prob - ref_log_prob


def k2(log_prob: Tensor, ref_log_prob: Tensor) -> Tensor:
    """(log_prob - ref_log_prob)^2 / 2, (B, T)."""
    return 0.5 * (log_prob - ref_log_prob).square()


def k3(log_prob: Tensor, ref_log_prob: Tensor) -> Tensor:
    """exp(d) - 1 - d with d = ref_log_prob - log_prob, (B, T).

    d is held within +-20, so that one token cannot make a step infinite; beyond it there is no gradient.
    """
    difference = (ref_log_prob - log_prob).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    return torch.expm1(difference) - difference


def absolute(log_prob: Tensor, ref_log_prob: Tensor) -> Tensor:
    """|log_prob - ref_log_prob|, (B, T): no estimate of the divergence, but a penalty on any difference."""
    return (log_prob - ref_log_prob).abs()


def k1_plus(log_prob: Tensor, ref_log_prob: Tensor) -> Tensor:
    """The value of `k1` with the gradient of `k2`, (B, T)."""
    return _with_gradient_of_k2(k1, log_prob, ref_log_prob)


def k3_plus(log_prob: Tensor, ref_log_prob: Tensor) -> Tensor:
    """The value of `k3` with the gradient of `k2`, (B, T)."""
    return _with_gradient_of_k2(k3, log_prob, ref_log_prob)


KLEstimator = Callable[[Tensor, Tensor], Tensor]


def _with_gradient_of_k2(value: KLEstimator, log_prob: Tensor, ref_log_prob: Tensor) -> Tensor:
    gradient = k2(log_prob, ref_log_prob)
    return value(log_prob, ref_log_prob).detach() + (gradient - gradient.detach())


KL_ESTIMATORS: dict[str, KLEstimator] = {
    "k1": k1,
    "k2": k2,
    "k3": k3,
    "abs": absolute,
    "k1+": k1_plus,
    "k3+": k3_plus,
}
"""The values of `algorithm.kl_penalty` and `actor.kl_loss_type`."""


class KLController(Protocol):
    """The coefficient of the KL penalty in the reward."""

    value: float

    def update(self, current_kl: float, n_sequences: int) -> None:
        """Take in the mean KL of a sequence, in nats, over the `n_sequences` of a step."""


@dataclass
class FixedKLController:
    """A coefficient that stays."""

    value: float

    def update(self, current_kl: float, n_sequences: int) -> None:
        """Changes nothing."""


@dataclass
class AdaptiveKLController:
    """A coefficient that steers KL towards a target (Ziegler et al. 2019, arXiv 1909.08593, section 2.2).

    Attributes:
        value: the coefficient.
        target_kl: KL a sequence to aim at, in nats.
        horizon: sequences after which an error of 20 % has changed the coefficient by about 20 %.
    """

    value: float
    target_kl: float
    horizon: int

    def update(self, current_kl: float, n_sequences: int) -> None:
        """Move the coefficient by the relative error, taken as at most 20 %, times n_sequences / horizon."""
        error = min(max(current_kl / self.target_kl - 1, -0.2), 0.2)
        self.value *= 1 + error * n_sequences / self.horizon


def kl_controller(config: KLControlConfig) -> KLController:
    """The controller that `algorithm.kl_ctrl` asks for."""
    if config.type == "adaptive":
        return AdaptiveKLController(config.kl_coef, config.target_kl, config.horizon)
    return FixedKLController(config.kl_coef)
