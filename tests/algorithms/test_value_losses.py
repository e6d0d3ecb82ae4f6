from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_npu.algorithms.value_losses import clipped_value_loss, explained_variance
from tests.algorithms.ragged import normal, random_batch

NUMBERS = st.floats(-10, 10)


@settings(deadline=None)
@given(value=NUMBERS, old=NUMBERS, target=NUMBERS, clip=st.floats(0.01, 5))
def test_the_loss_is_the_larger_squared_error(value: float, old: float, target: float, clip: float) -> None:
    held = min(max(value, old - clip), old + clip)
    vpreds, old_values, returns = torch.tensor([value, old, target], dtype=torch.float64).view(3, 1, 1)
    result = clipped_value_loss(vpreds, old_values, returns, clip)
    expected = max((value - target) ** 2, (held - target) ** 2) / 2
    assert float(result.loss) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("value", "target", "clipped", "gradient"),
    [(0.1, 5.0, 0, -4.9), (3.0, 5.0, 1, 0.0), (3.0, -5.0, 0, 8.0), (-3.0, -5.0, 1, 0.0)],
)
def test_no_gradient_where_the_clip_decides(value: float, target: float, clipped: int, gradient: float) -> None:
    vpreds = torch.tensor([[value]], requires_grad=True)
    result = clipped_value_loss(vpreds, torch.zeros(1, 1), torch.tensor([[target]]), 0.5)
    result.loss.sum().backward()
    assert float(result.metrics["vf_clipfrac"]) == clipped
    assert vpreds.grad is not None
    assert float(vpreds.grad) == pytest.approx(gradient)
    assert not result.metrics["vf_clipfrac"].requires_grad


def test_explained_variance_is_that_of_the_response_tokens() -> None:
    returns, mask = random_batch(0, 6, 5)
    values = returns + 0.3 * normal(1, 6, 5)
    tokens = mask != 0
    residual, target = (returns - values)[tokens].tolist(), returns[tokens].tolist()
    expected = 1 - statistics.pvariance(residual) / statistics.pvariance(target)
    assert explained_variance(values, returns, mask) == pytest.approx(expected, rel=1e-10)


def test_explained_variance_at_its_landmarks() -> None:
    returns, mask = normal(2, 4, 3), torch.ones(4, 3)
    assert explained_variance(returns + 7, returns, mask) == pytest.approx(1)
    assert explained_variance(torch.zeros_like(returns), returns, mask) == pytest.approx(0)
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3)
    assert explained_variance(returns, torch.ones(4, 3), mask) == 0.0


def test_explained_variance_over_ranks_is_that_of_the_whole() -> None:
    returns, values, mask = normal(3, 4, 3), normal(4, 4, 3), torch.ones(4, 3)
    doubled = explained_variance(values, returns, mask, all_reduce=lambda tensor: 2 * tensor)
    both = explained_variance(values.repeat(2, 1), returns.repeat(2, 1), mask.repeat(2, 1))
    assert doubled == pytest.approx(both, rel=1e-12)
