from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_npu.algorithms.aggregation import (
    AGGREGATIONS,
    AllReduce,
    BatchTotals,
    aggregate,
    masked_mean,
    masked_sum,
    masked_whiten,
)
from tests.algorithms.ragged import random_batch

HORIZON = 12


def loss_by_definition(values: Tensor, mask: Tensor, mode: str) -> float:
    rows = [
        [v for v, m in zip(row, keep, strict=True) if m]
        for row, keep in zip(values.tolist(), mask.tolist(), strict=True)
    ]
    if mode == "token-mean":
        return sum(map(sum, rows)) / sum(map(len, rows))
    if mode == "token-sum":
        return sum(map(sum, rows))
    if mode == "seq-mean-token-sum":
        return sum(map(sum, rows)) / len(rows)
    if mode == "seq-mean-token-mean":
        return sum(sum(row) / len(row) for row in rows if row) / len(rows)
    return sum(map(sum, rows)) / len(rows) / HORIZON


def replay(sums: list[Tensor]) -> AllReduce:
    """An all-reduce whose results are known."""
    left = iter(sums)
    return lambda local: next(left)


def totals_of(mask: Tensor) -> BatchTotals:
    return BatchTotals(tokens=float(mask.sum()), sequences=len(mask), horizon=HORIZON)


@settings(deadline=None, max_examples=25)
@given(
    mode=st.sampled_from(sorted(AGGREGATIONS)),
    seed=st.integers(0, 1000),
    batch=st.integers(1, 9),
    cuts=st.lists(st.integers(0, 9), max_size=4),
)
def test_shares_of_any_cut_sum_to_the_loss(mode: str, seed: int, batch: int, cuts: list[int]) -> None:
    values, mask = random_batch(seed, batch, 7)
    bounds = sorted({0, batch, *(min(cut, batch) for cut in cuts)})
    shares = [aggregate(values[start:end], mask[start:end], mode, totals_of(mask)) for start, end in pairwise(bounds)]
    assert float(sum(shares)) == pytest.approx(loss_by_definition(values, mask, mode), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("mode", sorted(AGGREGATIONS))
def test_padding_gets_no_gradient(mode: str) -> None:
    values, mask = random_batch(3, 5, 6)
    values.requires_grad_()
    aggregate(values, mask, mode, totals_of(mask)).backward()
    assert values.grad is not None
    assert torch.equal(values.grad != 0, mask != 0)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(KeyError, match="mean-of-means"):
        aggregate(torch.ones(1, 1), torch.ones(1, 1), "mean-of-means", BatchTotals(1, 1, 1))


def test_masked_sum_and_mean() -> None:
    values = torch.tensor([[1.0, 2.0, math.inf], [4.0, math.nan, -math.inf]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    assert float(masked_sum(values, mask)) == 7.0
    assert float(masked_mean(values, mask)) == pytest.approx(7 / 3)
    assert float(masked_mean(values, torch.zeros_like(mask))) == 0.0


def test_whitened_values_have_mean_0_and_variance_1() -> None:
    values, mask = random_batch(1, 8, 5)
    whitened = masked_whiten(3 * values + 100, mask)
    tokens = whitened[mask != 0]
    assert float(tokens.mean()) == pytest.approx(0, abs=1e-12)
    assert float(tokens.var(correction=0)) == pytest.approx(1, abs=1e-8)
    assert torch.equal(whitened[mask == 0], torch.zeros(int((mask == 0).sum()), dtype=torch.float64))


def test_whitening_can_keep_the_mean() -> None:
    values, mask = random_batch(2, 8, 5)
    expected = values[mask != 0].mean()
    tokens = masked_whiten(values, mask, shift_mean=False)[mask != 0]
    assert float(tokens.mean()) == pytest.approx(float(expected), abs=1e-12)
    assert float(tokens.var(correction=0)) == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("cut", [1, 4, 7])
def test_ranks_whiten_as_one_batch_would_be(cut: int) -> None:
    values, mask = random_batch(4, 8, 5)
    whole = masked_whiten(values, mask)
    # Each rank's three sums, in the order in which a rank asks for them.
    parts = [(values[:cut], mask[:cut]), (values[cut:], mask[cut:])]
    tokens = [part[keep != 0] for part, keep in parts]
    count = torch.tensor(float(sum(map(len, tokens))), dtype=torch.float64)
    total = torch.stack([part.sum() for part in tokens]).sum()
    deviations = torch.stack([(part - total / count).square().sum() for part in tokens]).sum()
    for (part, keep), rows in zip(parts, (slice(None, cut), slice(cut, None)), strict=True):
        whitened = masked_whiten(part, keep, all_reduce=replay([count, total, deviations]))
        torch.testing.assert_close(whitened, whole[rows], rtol=0, atol=1e-12)


def test_equal_values_whiten_to_0() -> None:
    whitened = masked_whiten(torch.full((3, 4), 0.1), torch.ones(3, 4))
    assert float(whitened.abs().max()) < 1e-3


def test_whitening_survives_a_rank_without_tokens() -> None:
    whitened = masked_whiten(torch.full((2, 3), torch.nan), torch.zeros(2, 3))
    assert torch.equal(whitened, torch.zeros(2, 3))
