"""Correcting for what the rollout engine sampled with other probabilities than the trainer's.

Importance weights multiply the policy loss; rejection leaves tokens or whole responses out of it. Both look at the
ratio r of the trainer's probability of a token, before this step's updates, to the rollout's. Names and options are
those of verl's `algorithm.rollout_correction`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_npu.algorithms.aggregation import Ranks, masked_sum
from rlhf_npu.algorithms.token_ratios import ratio_of
from rlhf_npu.config import RolloutCorrectionConfig


@dataclass(frozen=True)
class RolloutCorrection:
    """What a batch's policy loss is corrected by.

    Attributes:
        weights: (B, T), factors of the loss, without gradient; None if there are none.
        kept: (B, T), 1 at the response tokens that are not rejected.
        metrics: `rollout_corr/*`, over all ranks.
    """

    weights: Tensor | None
    kept: Tensor
    metrics: dict[str, float]


@torch.no_grad()
def correct_rollout(
    rollout_log_probs: Tensor, old_log_probs: Tensor, mask: Tensor, config: RolloutCorrectionConfig, ranks: Ranks
) -> RolloutCorrection:
    """Importance weights and rejections, as the configuration asks for them.

    Args:
        rollout_log_probs: (B, T) of the sampled tokens, from the rollout engine.
        old_log_probs: (B, T) of the same tokens, from the trainer before its updates.
        mask: (B, T) response tokens.
    """
    tokens = mask != 0
    log_ratio = (old_log_probs - rollout_log_probs).masked_fill(~tokens, 0)
    kept, metrics = mask, dict[str, float]()
    weights = None
    if config.rollout_is is not None:
        weights, metrics = importance_weights(log_ratio, mask, config, ranks)
    if config.rollout_rs is not None:
        kept = (accepted(log_ratio, mask, config) & tokens).to(mask)
        metrics |= _rejection_metrics(kept != 0, tokens, ranks)
    return RolloutCorrection(weights, kept, metrics)


def importance_weights(
    log_ratio: Tensor, mask: Tensor, config: RolloutCorrectionConfig, ranks: Ranks
) -> tuple[Tensor, dict[str, float]]:
    """Weights (B, T) that are r at each token, or the product of a response's ratios at all of them.

    Without `rollout_is_threshold_lower` they are truncated at `rollout_is_threshold` (truncated importance sampling,
    Yao et al. 2025, https://fengyao.notion.site/off-policy-rl); with it, a weight outside of both bounds is 0 (masked
    importance sampling, IcePop). `rollout_is_batch_normalize` then divides by their mean, over tokens or responses.

    Returns:
        the weights, 0 where there is no response token, and their metrics, from before the normalization.
    """
    tokens = mask != 0
    by_sequence = config.rollout_is == "sequence"
    raw = ratio_of(log_ratio.sum(1, keepdim=True).expand_as(log_ratio) if by_sequence else log_ratio)
    upper, lower = config.rollout_is_threshold, config.rollout_is_threshold_lower
    weights = raw.clamp(max=upper) if lower is None else raw.masked_fill((raw < lower) | (raw > upper), 0)
    weights = weights.masked_fill(~tokens, 0)
    counted = _first_tokens(tokens) if by_sequence else tokens
    metrics = _weight_metrics(weights, tokens, ranks)
    metrics |= _threshold_metrics(raw, counted, upper, 1 / upper if lower is None else lower, ranks)
    if config.rollout_is_batch_normalize:
        total, count = ranks.all_reduce(torch.stack([weights[counted].sum(), counted.sum().to(weights)]))
        mean = float(total / count.clamp(min=1))
        metrics["rollout_corr/rollout_is_batch_norm_factor"] = mean
        weights = weights / mean if mean > 0 else weights
    return weights, metrics


def accepted(log_ratio: Tensor, mask: Tensor, config: RolloutCorrectionConfig) -> Tensor:
    """Where (B, T) of bool the divergence that `rollout_rs` names is within its bounds.

    The divergence of a token is log r (k1), (log r)^2 / 2 (k2) or r - 1 - log r (k3); that of a response is the sum,
    mean or maximum of its tokens'. exp(k1) must be in [rollout_rs_threshold_lower, rollout_rs_threshold], the lower
    bound being 1 / rollout_rs_threshold if it is null; k2 and k3 must be at most rollout_rs_threshold.
    """
    assert config.rollout_rs is not None
    assert config.rollout_rs_threshold is not None
    level, estimator = config.rollout_rs.rsplit("_", 1)
    divergence = _over_tokens(_divergence(log_ratio, estimator), mask, level)
    upper, lower = config.rollout_rs_threshold, config.rollout_rs_threshold_lower
    if estimator != "k1":
        return (divergence <= upper).expand_as(log_ratio)
    lowest = -math.log(upper) if lower is None else math.log(lower)
    return ((divergence >= lowest) & (divergence <= math.log(upper))).expand_as(log_ratio)


def _divergence(log_ratio: Tensor, estimator: str) -> Tensor:
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    return ratio_of(log_ratio) - 1 - log_ratio


def _over_tokens(divergence: Tensor, mask: Tensor, level: str) -> Tensor:
    if level == "token":
        return divergence
    tokens = mask != 0
    inside = divergence.masked_fill(~tokens, 0)
    if level == "seq_max":
        return inside.max(1, keepdim=True).values
    total = inside.sum(1, keepdim=True)
    return total if level == "seq_sum" else total / tokens.sum(1, keepdim=True).clamp(min=1)


def _first_tokens(tokens: Tensor) -> Tensor:
    """One token of each response that has any."""
    return tokens & (tokens.cumsum(1) == 1)


def _weight_metrics(weights: Tensor, tokens: Tensor, ranks: Ranks) -> dict[str, float]:
    sums = [weights.sum(), weights.square().sum(), tokens.sum().to(weights)]
    total, squares, count = ranks.all_reduce(torch.stack(sums).double()).tolist()
    mean, mean_square = total / max(1.0, count), squares / max(1.0, count)
    lowest = weights.masked_fill(~tokens, math.inf).min().reshape(1)
    return {
        "rollout_corr/rollout_is_mean": mean,
        "rollout_corr/rollout_is_std": math.sqrt(max(0.0, mean_square - mean * mean)),
        "rollout_corr/rollout_is_max": float(ranks.gather(weights.max().reshape(1)).max()),
        "rollout_corr/rollout_is_min": float(ranks.gather(lowest).min()),
        "rollout_corr/rollout_is_eff_sample_size": mean * mean / mean_square if mean_square else 0.0,
    }


def _threshold_metrics(raw: Tensor, counted: Tensor, upper: float, lower: float, ranks: Ranks) -> dict[str, float]:
    sums = [masked_sum((raw > upper).to(raw), counted), masked_sum((raw < lower).to(raw), counted)]
    high, low, count = ranks.all_reduce(torch.stack([*sums, counted.sum().to(raw)])).tolist()
    return {
        "rollout_corr/rollout_is_ratio_fraction_high": high / max(1.0, count),
        "rollout_corr/rollout_is_ratio_fraction_low": low / max(1.0, count),
    }


def _rejection_metrics(kept: Tensor, tokens: Tensor, ranks: Ranks) -> dict[str, float]:
    masked = tokens & ~kept
    counts = [masked.sum(), tokens.sum(), masked.any(1).sum(), tokens.any(1).sum()]
    masked_tokens, all_tokens, masked_sequences, sequences = ranks.all_reduce(torch.stack(counts).float()).tolist()
    return {
        "rollout_corr/rollout_rs_masked_fraction": masked_tokens / max(1.0, all_tokens),
        "rollout_corr/rollout_rs_seq_masked_fraction": masked_sequences / max(1.0, sequences),
    }
