"""Policy losses by name."""

from __future__ import annotations

from collections.abc import Callable

from rlhf_npu.algorithms.aggregation import TokenLoss
from rlhf_npu.algorithms.covariance import clip_cov, kl_cov
from rlhf_npu.algorithms.sequence_ratios import geo_mean, gspo
from rlhf_npu.algorithms.token_ratios import PolicyInputs, cispo, gpg, sapo, vanilla
from rlhf_npu.config import ActorConfig

__all__ = ["POLICY_LOSSES", "PolicyInputs"]

POLICY_LOSSES: dict[str, Callable[[PolicyInputs, ActorConfig], TokenLoss]] = {
    "vanilla": vanilla,
    "gspo": gspo,
    "cispo": cispo,
    "sapo": sapo,
    "geo_mean": geo_mean,
    "gpg": gpg,
    "clip_cov": clip_cov,
    "kl_cov": kl_cov,
}
"""The values of `actor.policy_loss.loss_mode`."""
