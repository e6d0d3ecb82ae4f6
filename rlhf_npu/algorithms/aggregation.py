"""Sums and means over response tokens that do not depend on how a batch is cut.

Tensors are (B, T): B sequences, T response positions. A mask holds 1 at response tokens and 0 elsewhere;
what stands at the other positions is ignored, NaN and infinities included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

AllReduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all ranks and returns the sum."""


def identity(tensor: Tensor) -> Tensor:
    """The sum over ranks when there is one rank."""
    return tensor


Gather = Callable[[Tensor], Tensor]
"""Joins one-dimensional tensors of equal length of all ranks, on each of them."""


@dataclass(frozen=True)
class Ranks:
    """How this rank learns what the others have; as it stands, when there is one rank."""

    all_reduce: AllReduce = identity
    gather: Gather = identity


@dataclass(frozen=True)
class TokenLoss:
    """A loss for each token, before aggregation.

    Attributes:
        loss: (B, T), differentiable.
        metrics: (B, T) each, without gradient; their masked mean is what is reported.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class BatchTotals:
    """What a mini-batch holds over all its micro-batches and ranks.

    Attributes:
        tokens: response tokens that are trained on.
        sequences: sequences, those that nothing is trained on included.
        horizon: the longest response that is allowed, in tokens.
    """

    tokens: float
    sequences: float
    horizon: int


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over response tokens, a scalar."""
    return values.masked_fill(mask == 0, 0).sum()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over response tokens, a scalar; 0 where there are none."""
    return masked_sum(values, mask) / (mask != 0).sum().clamp(min=1)


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True, all_reduce: AllReduce = identity) -> Tensor:
    """Scale response tokens to variance 1 and, with `shift_mean`, to mean 0, over all ranks.

    The variance is the population's, from deviations (two passes), and 1e-8 is added to it: equal values
    become 0, or with `shift_mean=False` keep their mean. Positions that are no response tokens become 0.
    """
    tokens = mask != 0
    count = all_reduce(tokens.sum().to(values)).clamp(min=1)
    mean = all_reduce(masked_sum(values, mask)) / count
    centred = (values - mean).masked_fill(~tokens, 0)
    variance = all_reduce(centred.square().sum()) / count
    whitened = centred * torch.rsqrt(variance + 1e-8)
    return whitened if shift_mean else (whitened + mean).masked_fill(~tokens, 0)


def _token_mean(values: Tensor, mask: Tensor, totals: BatchTotals) -> Tensor:
    return masked_sum(values, mask) / totals.tokens


def _token_sum(values: Tensor, mask: Tensor, totals: BatchTotals) -> Tensor:  # noqa: ARG001
    return masked_sum(values, mask)


def _seq_mean_token_sum(values: Tensor, mask: Tensor, totals: BatchTotals) -> Tensor:
    return masked_sum(values, mask) / totals.sequences


def _seq_mean_token_mean(values: Tensor, mask: Tensor, totals: BatchTotals) -> Tensor:
    tokens = mask != 0
    means = values.masked_fill(~tokens, 0).sum(1) / tokens.sum(1).clamp(min=1)
    return means.sum() / totals.sequences


def _seq_mean_token_sum_norm(values: Tensor, mask: Tensor, totals: BatchTotals) -> Tensor:
    return masked_sum(values, mask) / (totals.sequences * totals.horizon)


AGGREGATIONS: dict[str, Callable[[Tensor, Tensor, BatchTotals], Tensor]] = {
    "token-mean": _token_mean,
    "token-sum": _token_sum,
    "seq-mean-token-sum": _seq_mean_token_sum,
    "seq-mean-token-mean": _seq_mean_token_mean,
    "seq-mean-token-sum-norm": _seq_mean_token_sum_norm,
}
"""How token losses become one number: `token-mean` as in DAPO (Yu et al. 2025, arXiv 2503.14476, eq. 12),
`seq-mean-token-mean` as in GRPO (Shao et al. 2024, arXiv 2402.03300, eq. 3), `seq-mean-token-sum-norm`, which
divides by a constant length, as in Dr. GRPO (Liu et al. 2025, arXiv 2503.20783, section 3.2), and `token-sum`, which
divides by nothing: the learning rate must then go with the size of the mini-batch."""


def aggregate(values: Tensor, mask: Tensor, mode: str, totals: BatchTotals) -> Tensor:
    """This micro-batch's share of the mini-batch's loss, a scalar.

    The shares of all micro-batches on all ranks sum to the loss, whatever the cut, because `totals` counts
    the whole mini-batch. An empty response adds 0.

    Args:
        values: (B, T) a loss for each token.
        mask: (B, T) response tokens.
        mode: a key of `AGGREGATIONS`.
        totals: of the mini-batch.
    """
    return AGGREGATIONS[mode](values, mask, totals)
