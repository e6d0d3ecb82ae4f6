"""How far the rollout engine's log-probabilities are from the trainer's, over all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from tensordict import TensorDict

from rlhf_npu.algorithms.rollout_mismatch import MAXIMA, SUMS, mismatch_metrics, rollout_mismatch
from rlhf_npu.engines.collectives import MAX, SUM, all_reduce


def mismatch_over_ranks(batch: TensorDict) -> dict[str, float]:
    """`rollout_corr/*` of a batch with `rollout_log_probs` and `old_log_probs`; every rank calls this together."""
    local = rollout_mismatch(batch["rollout_log_probs"], batch["old_log_probs"], batch["response_mask"])
    reduced = _reduce(local, SUMS, SUM) | _reduce(local, MAXIMA, MAX)
    return mismatch_metrics(reduced)


def _reduce(
    local: dict[str, torch.Tensor], names: tuple[str, ...], operation: dist.ReduceOp.RedOpType
) -> dict[str, torch.Tensor]:
    values = all_reduce(torch.stack([local[name].double() for name in names]), operation)
    return dict(zip(names, values, strict=True))
