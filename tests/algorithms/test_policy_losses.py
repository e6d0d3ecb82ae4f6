from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_npu.algorithms.aggregation import TokenLoss
from rlhf_npu.algorithms.token_ratios import PolicyInputs, vanilla
from rlhf_npu.config import ActorConfig
from tests.algorithms.ragged import normal

CLIPS = ActorConfig(clip_ratio_low=0.2, clip_ratio_high=0.2, clip_ratio_c=3.0)


def loss_of(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, config: ActorConfig = CLIPS) -> TokenLoss:
    return vanilla(PolicyInputs(log_prob, old_log_prob, advantages, torch.ones_like(log_prob)), config)


def one_token(ratio: float, advantage: float, low: float = 0.2, high: float = 0.2, c: float = 0.0) -> TokenLoss:
    log_prob = torch.tensor([[math.log(ratio)]], dtype=torch.float64)
    config = ActorConfig(clip_ratio_low=low, clip_ratio_high=high, clip_ratio_c=c)
    return loss_of(log_prob, torch.zeros_like(log_prob), torch.full_like(log_prob, advantage), config)


@settings(deadline=None)
@given(
    ratio=st.floats(0.01, 100),
    advantage=st.floats(-5, 5),
    low=st.floats(0.01, 0.9),
    high=st.floats(0.01, 2),
    c=st.sampled_from([0.0, 1.5, 3.0]),
)
def test_the_loss_is_the_papers(ratio: float, advantage: float, low: float, high: float, c: float) -> None:
    objective = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    if c and advantage < 0:
        objective = max(objective, c * advantage)
    loss = one_token(ratio, advantage, low, high, c).loss
    assert float(loss) == pytest.approx(-objective, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "clipped", "lower"),
    [
        (1.0, 1.0, 0, 0),
        (1.5, 1.0, 1, 0),
        (0.5, 1.0, 0, 0),
        (0.5, -1.0, 1, 0),
        (1.5, -1.0, 0, 0),
        (4.0, -1.0, 0, 1),
        (4.0, 1.0, 1, 0),
    ],
)
def test_metrics_say_which_clip_decides(ratio: float, advantage: float, clipped: int, lower: int) -> None:
    result = one_token(ratio, advantage, c=3.0)
    assert float(result.metrics["pg_clipfrac"]) == clipped
    assert float(result.metrics["pg_clipfrac_lower"]) == lower
    assert float(result.metrics["ppo_kl"]) == pytest.approx(-math.log(ratio))


@pytest.mark.parametrize(
    ("ratio", "advantage", "flows"),
    [(1.1, 1.0, True), (1.5, 1.0, False), (0.5, -1.0, False), (1.5, -1.0, True), (5.0, -1.0, False)],
)
def test_no_gradient_where_a_clip_decides(ratio: float, advantage: float, flows: bool) -> None:
    log_prob = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    result = loss_of(log_prob, torch.zeros(1, 1), torch.full((1, 1), advantage, dtype=torch.float64))
    result.loss.sum().backward()
    expected = -advantage * ratio if flows else 0.0
    assert log_prob.grad is not None
    assert float(log_prob.grad) == pytest.approx(expected)


def test_on_policy_the_gradient_is_reinforce() -> None:
    log_prob = normal(0, 3, 4).requires_grad_()
    advantages = normal(1, 3, 4)
    loss_of(log_prob, log_prob.detach(), advantages).loss.sum().backward()
    assert log_prob.grad is not None
    torch.testing.assert_close(log_prob.grad, -advantages, rtol=0, atol=1e-15)


@pytest.mark.parametrize("log_ratio", [-2000.0, 2000.0])
def test_a_token_far_off_policy_cannot_overflow(log_ratio: float) -> None:
    log_prob = torch.full((1, 1), log_ratio, requires_grad=True)
    config = ActorConfig(clip_ratio_low=0.2, clip_ratio_high=0.2, clip_ratio_c=0.0)
    loss = loss_of(log_prob, torch.zeros(1, 1), torch.full((1, 1), -1.0), config).loss
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert log_prob.grad is not None
    assert torch.isfinite(log_prob.grad).all()


def test_metrics_carry_no_gradient() -> None:
    log_prob = torch.zeros(1, 1, requires_grad=True)
    result = loss_of(log_prob, torch.zeros(1, 1), torch.ones(1, 1))
    assert result.loss.requires_grad
    assert not any(metric.requires_grad for metric in result.metrics.values())
