"""What a micro-batch of the offline loop holds, and the sums over its completions that objectives are made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_npu.data.packing import PackedBatch


@dataclass(frozen=True)
class OfflineTotals:
    """Of a whole batch, over all ranks: what its shares are divided by.

    Attributes:
        examples: pairs count once.
        tokens: trained ones.
    """

    examples: int
    tokens: int


@dataclass(frozen=True)
class OfflineBatch:
    """E examples with R completions in all.

    Attributes:
        packed: their tokens.
        totals: of the batch that this is a part of.
        reference: (R,) log-probabilities of the completions under the reference; None without one.
        labels: (E,) bool, whether an unpaired completion is desirable; None for others.
        margins: (E,) by how much a pair's chosen completion is better; None where the data says nothing.
        kl: () estimate of KL(policy || reference) for KTO, over the whole batch; None for others.
    """

    packed: PackedBatch
    totals: OfflineTotals
    reference: Tensor | None = None
    labels: Tensor | None = None
    margins: Tensor | None = None
    kl: Tensor | None = None


def completion_sums(log_probs: Tensor, packed: PackedBatch) -> Tensor:
    """Log-probabilities (R,) of completions, from those (K,) of their trained tokens."""
    return log_probs.new_zeros(packed.rows).index_add(0, packed.row, log_probs)


def completion_tokens(packed: PackedBatch) -> Tensor:
    """Trained tokens (R,) of completions."""
    return torch.bincount(packed.row, minlength=packed.rows)
