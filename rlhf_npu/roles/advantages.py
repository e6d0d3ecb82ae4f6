"""Token rewards, advantages and returns of this rank's sequences, with statistics over all ranks."""

from __future__ import annotations

import torch
from tensordict import TensorDict

from rlhf_npu.algorithms.advantages import ADVANTAGES, AdvantageInputs
from rlhf_npu.algorithms.aggregation import masked_whiten
from rlhf_npu.algorithms.kl import KL_ESTIMATORS
from rlhf_npu.algorithms.token_rewards import overlong_penalties, penalize_kl, place_scores
from rlhf_npu.algorithms.value_losses import explained_variance
from rlhf_npu.config import AlgorithmConfig, PPOConfig
from rlhf_npu.engines.collectives import MAX, all_reduce


def add_token_rewards(batch: TensorDict, config: PPOConfig, kl_coef: float) -> dict[str, float]:
    """Set `token_level_rewards` (B, R) from `scores` (B,), less the penalties that are on: for length and for KL.

    Returns:
        with the penalty on length, `reward/overlong_penalty`, its mean, and `reward/overlong`, the fraction of
        responses that it met; with that on KL, `actor/reward_kl_penalty`: the mean KL of a sequence in nats.
    """
    mask = batch["response_mask"]
    metrics: dict[str, float] = {}
    scores = batch["scores"]
    if config.reward.overlong_buffer.len:
        penalties = _overlong_penalties(batch, config)
        scores = scores + penalties
        metrics["reward/overlong_penalty"] = _mean(penalties)
        metrics["reward/overlong"] = _mean((penalties < 0).float())
    batch["token_level_rewards"] = place_scores(scores, mask)
    if config.algorithm.use_kl_in_reward:
        kl = KL_ESTIMATORS[config.algorithm.kl_penalty](batch["old_log_probs"], batch["ref_log_probs"]) * mask
        batch["token_level_rewards"] = penalize_kl(batch["token_level_rewards"], kl, mask, kl_coef)
        metrics["actor/reward_kl_penalty"] = _mean(kl.sum(1))
        metrics["actor/reward_kl_penalty_coeff"] = kl_coef
    return metrics


def _overlong_penalties(batch: TensorDict, config: PPOConfig) -> torch.Tensor:
    buffer = config.reward.overlong_buffer
    lengths = batch["response_mask"].sum(1)
    return overlong_penalties(lengths, config.data.max_response_length, buffer.len, buffer.penalty_factor)


def _mean(values: torch.Tensor) -> float:
    """The mean of (B,) values over all ranks."""
    total, count = all_reduce(torch.stack([values.sum(), values.new_tensor(float(len(values)))]).double()).tolist()
    return total / count


def add_advantages(batch: TensorDict, config: AlgorithmConfig) -> dict[str, float]:
    """Set `advantages` and `returns` (B, R); returns `critic/*` statistics over all ranks."""
    inputs = AdvantageInputs(
        token_level_rewards=batch["token_level_rewards"],
        response_mask=batch["response_mask"],
        values=batch.get("values"),
        group_ids=batch["group_ids"],
        baselines=batch.get("baselines"),
        all_reduce=all_reduce,
    )
    result = ADVANTAGES[config.adv_estimator](inputs, config)
    mask = batch["response_mask"]
    advantages = result.advantages
    if config.adv_estimator == "gae" and config.whiten_advantages:
        advantages = masked_whiten(advantages, mask, all_reduce=all_reduce)
    batch["advantages"], batch["returns"] = advantages, result.returns
    return _statistics(batch)


def _statistics(batch: TensorDict) -> dict[str, float]:
    tokens = batch["response_mask"].bool()
    sequence_rewards = batch["token_level_rewards"].sum(1)
    metrics = _spread("critic/score", batch["scores"]) | _spread("critic/rewards", sequence_rewards)
    for name in ("advantages", "returns", "values"):
        if name in batch:
            metrics |= _spread(f"critic/{name}", batch[name][tokens])
    if "values" in batch:
        metrics["critic/vf_explained_var"] = explained_variance(
            batch["values"], batch["returns"], batch["response_mask"], all_reduce
        )
    return metrics


def _spread(name: str, values: torch.Tensor) -> dict[str, float]:
    values = values.double()
    sums = all_reduce(torch.stack([values.sum(), values.new_tensor(float(values.numel()))]))
    extremes = all_reduce(torch.stack([values.max(), -values.min()]), MAX)
    return {
        f"{name}/mean": float(sums[0] / sums[1]),
        f"{name}/max": float(extremes[0]),
        f"{name}/min": float(-extremes[1]),
    }
