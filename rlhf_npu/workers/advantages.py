"""Token rewards, advantages and returns of this rank's sequences, with statistics over all ranks."""

from __future__ import annotations

import torch
from tensordict import TensorDict

from rlhf_npu.algorithms.advantages import ADVANTAGES, AdvantageInputs
from rlhf_npu.algorithms.aggregation import masked_whiten
from rlhf_npu.algorithms.kl import KL_ESTIMATORS
from rlhf_npu.algorithms.token_rewards import penalize_kl, place_scores
from rlhf_npu.algorithms.value_losses import explained_variance
from rlhf_npu.config import AlgorithmConfig
from rlhf_npu.engines.collectives import MAX, all_reduce


def add_token_rewards(batch: TensorDict, config: AlgorithmConfig, kl_coef: float) -> dict[str, float]:
    """Set `token_level_rewards` (B, R) from `scores` (B,), less the KL penalty if it is on.

    Returns:
        with the penalty on, `actor/reward_kl_penalty`: the mean KL of a sequence in nats.
    """
    mask = batch["response_mask"]
    batch["token_level_rewards"] = place_scores(batch["scores"], mask)
    if not config.use_kl_in_reward:
        return {}
    kl = KL_ESTIMATORS[config.kl_penalty](batch["old_log_probs"], batch["ref_log_probs"]) * mask
    batch["token_level_rewards"] = penalize_kl(batch["token_level_rewards"], kl, mask, kl_coef)
    total, sequences = all_reduce(torch.stack([kl.sum(), kl.new_tensor(float(len(kl)))]).double()).tolist()
    return {"actor/reward_kl_penalty": total / sequences, "actor/reward_kl_penalty_coeff": kl_coef}


def add_advantages(batch: TensorDict, config: AlgorithmConfig) -> dict[str, float]:
    """Set `advantages` and `returns` (B, R); returns `critic/*` statistics over all ranks."""
    inputs = AdvantageInputs(
        token_level_rewards=batch["token_level_rewards"],
        response_mask=batch["response_mask"],
        values=batch.get("values"),
        group_ids=batch["group_ids"],
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
