"""How far the rollout engine's log-probabilities are from the trainer's, and what is done about it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from tensordict import TensorDict

from rlhf_npu.algorithms.aggregation import Ranks
from rlhf_npu.algorithms.rollout_correction import correct_rollout
from rlhf_npu.algorithms.rollout_mismatch import MAXIMA, SUMS, mismatch_metrics, rollout_mismatch
from rlhf_npu.config import RolloutCorrectionConfig
from rlhf_npu.engines.collectives import MAX, SUM, all_reduce, gather


def mismatch_over_ranks(batch: TensorDict) -> dict[str, float]:
    """`rollout_corr/*` of a batch with `rollout_log_probs` and `old_log_probs`; every rank calls this together."""
    local = rollout_mismatch(batch["rollout_log_probs"], batch["old_log_probs"], batch["response_mask"])
    reduced = _reduce(local, SUMS, SUM) | _reduce(local, MAXIMA, MAX)
    return mismatch_metrics(reduced)


def correct_over_ranks(batch: TensorDict, config: RolloutCorrectionConfig) -> dict[str, float]:
    """Set `rollout_is_weights` (B, R) if they are on, and take what is rejected out of `loss_mask`.

    Every rank calls this together.

    Returns:
        `rollout_corr/rollout_is_*` and `rollout_corr/rollout_rs_*` of what is on.
    """
    ranks = Ranks(all_reduce, gather)
    log_probs = batch["rollout_log_probs"], batch["old_log_probs"]
    correction = correct_rollout(*log_probs, batch["response_mask"], config, ranks)
    batch["loss_mask"] = batch["loss_mask"] * correction.kept
    if correction.weights is not None:
        batch["rollout_is_weights"] = correction.weights
    return correction.metrics


def _reduce(
    local: dict[str, torch.Tensor], names: tuple[str, ...], operation: dist.ReduceOp.RedOpType
) -> dict[str, torch.Tensor]:
    values = all_reduce(torch.stack([local[name].double() for name in names]), operation)
    return dict(zip(names, values, strict=True))
