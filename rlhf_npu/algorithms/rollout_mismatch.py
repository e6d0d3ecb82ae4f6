"""How far the probabilities that the rollout engine sampled with are from those that the trainer computes.

Both come from the same weights, so what is left is numerics: kernels, precision, and mistakes in
resharding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_npu.algorithms.aggregation import masked_sum
from rlhf_npu.algorithms.kl import k3
from rlhf_npu.algorithms.token_ratios import ratio_of

SUMS = (
    "tokens",
    "sequences",
    "kl",
    "k3_kl",
    "log_ppl_diff",
    "log_ppl_abs_diff",
    "training_log_ppl",
    "rollout_log_ppl",
    "training_ppl",
    "rollout_ppl",
    "ppl_ratio",
    "chi2_token",
    "chi2_seq",
    "probs_diff",
    "logp_diff",
)
MAXIMA = ("probs_diff_max", "logp_diff_max")
_OF_TOKENS = ("kl", "k3_kl", "chi2_token")
_OF_SEQUENCES = (
    "log_ppl_diff",
    "log_ppl_abs_diff",
    "training_log_ppl",
    "rollout_log_ppl",
    "training_ppl",
    "rollout_ppl",
    "ppl_ratio",
    "chi2_seq",
)


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
    return {
        "tokens": tokens.sum().to(old),
        "kl": (rollout - old).sum(),
        "k3_kl": masked_sum(k3(rollout, old), mask),
        "chi2_token": _chi2(old - rollout).sum(),
        "probs_diff": probs_diff.sum(),
        "logp_diff": logp_diff.sum(),
        "probs_diff_max": probs_diff.max(),
        "logp_diff_max": logp_diff.max(),
        **_of_sequences(rollout, old, tokens),
    }


def _of_sequences(rollout: Tensor, old: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    lengths = tokens.sum(1)
    some = lengths > 0
    rollout_log_ppl, training_log_ppl = (-x.sum(1)[some] / lengths[some] for x in (rollout, old))
    difference = training_log_ppl - rollout_log_ppl
    return {
        "sequences": some.sum().to(old),
        "log_ppl_diff": difference.sum(),
        "log_ppl_abs_diff": difference.abs().sum(),
        "training_log_ppl": training_log_ppl.sum(),
        "rollout_log_ppl": rollout_log_ppl.sum(),
        "training_ppl": ratio_of(training_log_ppl).sum(),
        "rollout_ppl": ratio_of(rollout_log_ppl).sum(),
        "ppl_ratio": ratio_of(difference).sum(),
        "chi2_seq": _chi2((old - rollout).sum(1)[some]).sum(),
    }


def _chi2(log_ratio: Tensor) -> Tensor:
    """ratio^2 - 1, whose mean over what the rollout sampled is the chi-squared divergence."""
    return ratio_of(log_ratio).square() - 1


def mismatch_metrics(reduced: dict[str, Tensor]) -> dict[str, float]:
    """Metrics `rollout_corr/*` from the reduced scalars, by verl's names where it has them.

    `kl` (k1) and `k3_kl` estimate KL(rollout || trainer) a token, `chi2_token` and `chi2_seq` the chi-squared
    divergence of the trainer from the rollout, of tokens and of responses; `probs_diff`, `logp_diff` are absolute
    differences of a token's probability and log-probability. The others are means over responses: perplexities and
    their logarithms, the log-perplexity of the trainer less that of the rollout (`log_ppl_diff`), and their ratio
    (`ppl_ratio`).
    """
    tokens, sequences = (max(1.0, float(reduced[name])) for name in ("tokens", "sequences"))
    return {
        **{f"rollout_corr/{name}": float(reduced[name]) / tokens for name in _OF_TOKENS},
        **{f"rollout_corr/{name}": float(reduced[name]) / sequences for name in _OF_SEQUENCES},
        "rollout_corr/probs_diff_mean": float(reduced["probs_diff"]) / tokens,
        "rollout_corr/probs_diff_max": float(reduced["probs_diff_max"]),
        "rollout_corr/logp_diff_mean": float(reduced["logp_diff"]) / tokens,
        "rollout_corr/logp_diff_max": float(reduced["logp_diff_max"]),
    }
