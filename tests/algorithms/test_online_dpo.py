"""Online DPO's loss against its formula in float64, pair by pair."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_npu.algorithms.online_dpo import Pairs, online_dpo

BETA = 0.3


def random_pairs(count: int = 7) -> Pairs:
    generator = torch.Generator().manual_seed(5)
    log_probs, ref_log_probs = (torch.randn(2, count, 2, generator=generator) * 4 - 20).unbind()
    rewards = torch.randint(0, 3, (count, 2), generator=generator).float()
    rewards[:3] = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
    return Pairs(log_probs.requires_grad_(), ref_log_probs, rewards)


def reference(policy: list[float], ref: list[float], rewards: list[float]) -> tuple[float, float, list[float]]:
    """Loss, margin, and gradient by the two log-probabilities."""
    if rewards[0] == rewards[1]:
        return 0.0, 0.0, [0.0, 0.0]
    won = 0 if rewards[0] > rewards[1] else 1
    lost = 1 - won
    margin = BETA * (policy[won] - ref[won] - policy[lost] + ref[lost])
    weight = 1 / (1 + math.exp(margin))
    gradient = [BETA * weight, BETA * weight]
    gradient[won] *= -1
    return math.log1p(math.exp(-margin)), margin, gradient


def test_loss_margin_and_gradient_are_those_of_the_formula() -> None:
    pairs = random_pairs()
    result = online_dpo(pairs, BETA)
    result.loss.sum().backward()
    assert pairs.log_probs.grad is not None
    told = 0
    for place in range(len(pairs.rewards)):
        row = (pairs.log_probs[place].tolist(), pairs.ref_log_probs[place].tolist(), pairs.rewards[place].tolist())
        loss, margin, gradient = reference(*row)
        assert result.loss[place].item() == pytest.approx(loss, rel=1e-5, abs=1e-6)
        assert result.margin[place].item() == pytest.approx(margin, rel=1e-4, abs=1e-5)
        assert pairs.log_probs.grad[place].tolist() == pytest.approx(gradient, rel=1e-4, abs=1e-7)
        told += gradient != [0.0, 0.0]
    assert result.told.sum().item() == told
    assert 0 < told < len(pairs.rewards)


def test_the_order_of_a_pair_does_not_matter() -> None:
    pairs = random_pairs()
    turned = Pairs(pairs.log_probs.flip(1), pairs.ref_log_probs.flip(1), pairs.rewards.flip(1))
    assert torch.equal(online_dpo(pairs, BETA).loss, online_dpo(turned, BETA).loss)


def test_margins_that_float32_cannot_exponentiate() -> None:
    log_probs = torch.tensor([[-4000.0, 0.0], [0.0, -4000.0]], requires_grad=True)
    result = online_dpo(Pairs(log_probs, torch.zeros(2, 2), torch.tensor([[1.0, 0.0]] * 2)), 1.0)
    result.loss.sum().backward()
    assert result.loss.tolist() == [4000.0, 0.0]
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == [[-1.0, 1.0], [0.0, 0.0]]
