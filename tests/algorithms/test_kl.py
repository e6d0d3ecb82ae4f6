from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlhf_npu.algorithms.kl import (
    KL_ESTIMATORS,
    AdaptiveKLController,
    FixedKLController,
    kl_controller,
)
from rlhf_npu.config import KLControlConfig
from tests.algorithms.ragged import normal

TOKENS = 6


def kl(policy: Tensor, reference: Tensor) -> Tensor:
    """KL(softmax(policy) || softmax(reference)), summed over all tokens."""
    log_p, log_q = policy.log_softmax(-1), reference.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()


def expectation(name: str, logits: Tensor, reference: Tensor) -> Tensor:
    """The estimator's mean over tokens sampled from the policy, whose own gradient is left out, as in training."""
    log_p, log_q = logits.log_softmax(-1), reference.log_softmax(-1)
    return (log_p.exp().detach() * KL_ESTIMATORS[name](log_p, log_q)).sum()


@pytest.mark.parametrize("name", ["k1", "k3", "k1+", "k3+"])
def test_the_mean_is_the_divergence(name: str) -> None:
    policy, reference = normal(0, TOKENS), normal(1, TOKENS)
    assert float(expectation(name, policy, reference)) == pytest.approx(float(kl(policy, reference)), rel=1e-12)


def test_k2_is_near_the_divergence_where_policies_are_near() -> None:
    policy = normal(0, TOKENS)
    reference = policy + 0.01 * normal(1, TOKENS)
    assert float(expectation("k2", policy, reference)) == pytest.approx(float(kl(policy, reference)), rel=0.05)


def test_the_expected_gradients() -> None:
    policy, reference = normal(0, TOKENS).requires_grad_(), normal(1, TOKENS)

    def gradient(scalar: Tensor) -> Tensor:
        return torch.autograd.grad(scalar, policy)[0]

    expected = {
        "k1": torch.zeros_like(policy),
        "k2": gradient(kl(policy, reference)),
        "k3": gradient(kl(reference, policy)),
        "k1+": gradient(kl(policy, reference)),
        "k3+": gradient(kl(policy, reference)),
    }
    for name, direction in expected.items():
        torch.testing.assert_close(gradient(expectation(name, policy, reference)), direction, rtol=1e-10, atol=1e-12)


def test_the_absolute_difference() -> None:
    log_prob, ref_log_prob = normal(3, 2, 3), normal(4, 2, 3)
    expected = [abs(p - q) for p, q in zip(log_prob.flatten().tolist(), ref_log_prob.flatten().tolist(), strict=True)]
    assert KL_ESTIMATORS["abs"](log_prob, ref_log_prob).flatten().tolist() == expected


@pytest.mark.parametrize("name", ["k1", "k2", "k3", "abs"])
def test_gradcheck(name: str) -> None:
    log_prob = normal(5, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: KL_ESTIMATORS[name](x, normal(6, 3, 4)), log_prob)


@pytest.mark.parametrize("name", sorted(KL_ESTIMATORS))
def test_equal_policies_diverge_by_exactly_0(name: str) -> None:
    log_prob = normal(2, 3, 4)
    assert not KL_ESTIMATORS[name](log_prob, log_prob.clone()).any()


@pytest.mark.parametrize("name", ["k2", "k3", "abs", "k3+"])
def test_never_negative_even_in_float32(name: str) -> None:
    log_prob = normal(3, 100, 100).float()
    nearby = log_prob + 1e-4 * normal(4, 100, 100).float()
    assert float(KL_ESTIMATORS[name](log_prob, nearby).min()) >= 0


def test_k3_of_a_small_difference_is_precise_in_float32() -> None:
    difference = torch.tensor([[1e-3]])
    precise = torch.expm1(difference.double()) - difference.double()
    estimate = KL_ESTIMATORS["k3"](torch.zeros(1, 1), difference)
    assert float(estimate) == pytest.approx(float(precise), rel=2e-4)


def test_k3_of_a_token_far_off_is_finite_and_still() -> None:
    log_prob = torch.full((1, 1), -1000.0, requires_grad=True)
    estimate = KL_ESTIMATORS["k3"](log_prob, torch.zeros(1, 1))
    estimate.sum().backward()
    assert torch.isfinite(estimate).all()
    assert log_prob.grad is not None
    assert float(log_prob.grad) == 0


def test_fixed_coefficient_stays() -> None:
    controller = kl_controller(KLControlConfig(type="fixed", kl_coef=0.02))
    controller.update(current_kl=1000.0, n_sequences=64)
    assert controller == FixedKLController(0.02)


@pytest.mark.parametrize(
    ("current_kl", "error"), [(6.0, 0.0), (6.6, 0.1), (60.0, 0.2), (5.4, -0.1), (0.0, -0.2), (-3.0, -0.2)]
)
def test_adaptive_coefficient_follows_the_paper(current_kl: float, error: float) -> None:
    config = KLControlConfig(type="adaptive", kl_coef=0.1, horizon=1000, target_kl=6.0)
    controller = kl_controller(config)
    assert isinstance(controller, AdaptiveKLController)
    controller.update(current_kl, n_sequences=50)
    assert controller.value == pytest.approx(0.1 * (1 + error * 50 / 1000))
