"""How far the probabilities that the rollout engine sampled with are from those that the trainer computes.

Both come from the same weights, so what is left is numerics: kernels, precision, and mistakes in
resharding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_npu.algorithms.aggregation import masked_sum
from rlhf_npu.algorithms.kl import k3

SUMS = ("tokens", "sequences", "kl", "k3_kl", "log_ppl_diff", "probs_diff", "logp_diff")
MAXIMA = ("probs_diff_max", "logp_diff_max")


@torch.no_grad()
def rollout_mismatch(rollout_log_probs: Tensor, old_log_probs: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Scalars to be reduced over ranks: the keys `SUMS` by summing, the keys `MAXIMA` by taking the largest.

    Args:
        rollout_log_probs: (B, T) of the sampled tokens, from the rollout engine.
        old_log_probs: (B, T) of the same tokens, from the trainer before its updates.
        mask: (B, T) response tokens.
    """
    tokens = mask != 0
    rollout, old = (x.masked_fill(~tokens, 0) for x in (rollout_log_probs, old_log_probs))
    logp_diff = (rollout - old).abs()
    probs_diff = (rollout.exp() - old.exp()).abs()
    lengths = tokens.sum(1)
    return {
        "tokens": tokens.sum().to(old),
        "sequences": (lengths > 0).sum().to(old),
        "kl": (rollout - old).sum(),
        "k3_kl": masked_sum(k3(rollout, old), mask),
        "log_ppl_diff": ((rollout - old).sum(1) / lengths.clamp(min=1)).sum(),
        "probs_diff": probs_diff.sum(),
        "logp_diff": logp_diff.sum(),
        "probs_diff_max": probs_diff.max(),
        "logp_diff_max": logp_diff.max(),
    }


def mismatch_metrics(reduced: dict[str, Tensor]) -> dict[str, float]:
    """Metrics `rollout_corr/*` from the reduced scalars.

    `kl` (k1) and `k3_kl` estimate KL(rollout || trainer) a token, `log_ppl_diff` is the mean over responses
    of the trainer's log-perplexity less the rollout's, and `probs_diff`, `logp_diff` are absolute
    differences of a token's probability and log-probability.
    """
    tokens, sequences = (max(1.0, float(reduced[name])) for name in ("tokens", "sequences"))
    means = {name: float(reduced[name]) / tokens for name in ("kl", "k3_kl", "probs_diff", "logp_diff")}
    return {
        "rollout_corr/kl": means["kl"],
        "rollout_corr/k3_kl": means["k3_kl"],
        "rollout_corr/log_ppl_diff": float(reduced["log_ppl_diff"]) / sequences,
        "rollout_corr/probs_diff_mean": means["probs_diff"],
        "rollout_corr/probs_diff_max": float(reduced["probs_diff_max"]),
        "rollout_corr/logp_diff_mean": means["logp_diff"],
        "rollout_corr/logp_diff_max": float(reduced["logp_diff_max"]),
    }
