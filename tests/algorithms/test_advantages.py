from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_npu.algorithms.advantages import ADVANTAGES, AdvantageInputs
from rlhf_npu.algorithms.gae import discounted_suffix_sums, gae
from rlhf_npu.algorithms.group_advantages import grpo
from rlhf_npu.config import AlgorithmConfig
from tests.algorithms.ragged import holed_batch, normal, random_batch


def gae_config(gamma: float, lam: float) -> AlgorithmConfig:
    return AlgorithmConfig(adv_estimator="gae", gamma=gamma, lam=lam)


def grpo_config(by_std: bool) -> AlgorithmConfig:
    return AlgorithmConfig(adv_estimator="grpo", norm_adv_by_std_in_grpo=by_std)


def gae_by_definition(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """The sum of equation 16 of arXiv 1506.02438, term by term."""
    length = len(rewards)
    next_values = [*values, 0.0][1:]
    deltas = [r + gamma * after - v for r, v, after in zip(rewards, values, next_values, strict=True)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, length)) for t in range(length)]


def check_gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> None:
    result = gae(AdvantageInputs(rewards, mask, values), gae_config(gamma, lam))
    for row, keep in enumerate(mask != 0):
        own_values = values[row][keep].tolist()
        expected = gae_by_definition(rewards[row][keep].tolist(), own_values, gamma, lam)
        assert result.advantages[row][keep].tolist() == pytest.approx(expected, rel=1e-10, abs=1e-12)
        returns = [a + v for a, v in zip(expected, own_values, strict=True)]
        assert result.returns[row][keep].tolist() == pytest.approx(returns, rel=1e-10, abs=1e-12)
        assert not result.advantages[row][~keep].any()
        assert not result.returns[row][~keep].any()


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 1000),
    width=st.integers(1, 33),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
)
def test_gae_is_the_sum_in_the_paper(seed: int, width: int, gamma: float, lam: float) -> None:
    values, mask = random_batch(seed, 4, width)
    rewards, _ = random_batch(seed + 1, 4, width)
    check_gae(torch.where(mask != 0, normal(seed, 4, width), rewards), values, mask, gamma, lam)


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_gae_of_many_chunks_and_blocks_with_holes(lam: float) -> None:
    values, mask = holed_batch(3, 5, 200)
    check_gae(normal(4, 5, 200).masked_fill(mask == 0, torch.nan), values, mask, gamma=0.99, lam=lam)


def test_gae_steps_over_tokens_that_the_mask_leaves_out() -> None:
    mask = torch.tensor([[1.0, 0, 0, 1, 1, 0], [0, 1, 0, 1, 0, 1]])
    check_gae(normal(1, 2, 6), normal(2, 2, 6), mask, gamma=0.9, lam=0.8)


def test_without_discount_every_token_returns_the_score() -> None:
    rewards = torch.tensor([[0.0, 0.0, 3.0, 0.0]])
    mask = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    values = torch.tensor([[1.0, 2.0, 4.0, 9.0]])
    result = gae(AdvantageInputs(rewards, mask, values), gae_config(1.0, 1.0))
    assert result.returns.tolist() == [[3.0, 3.0, 3.0, 0.0]]
    assert result.advantages.tolist() == [[2.0, 1.0, -1.0, 0.0]]


def test_gae_without_a_critic_says_so() -> None:
    with pytest.raises(ValueError, match="critic"):
        gae(AdvantageInputs(torch.ones(1, 1), torch.ones(1, 1)), gae_config(1.0, 1.0))


def test_suffix_sums_of_a_long_response_stay_exact_in_float32() -> None:
    values = normal(0, 2, 8192)
    expected, rest = torch.zeros_like(values), torch.zeros(2, dtype=torch.float64)
    for t in reversed(range(8192)):
        rest = values[:, t] + 0.999 * rest
        expected[:, t] = rest
    sums = discounted_suffix_sums(values.float(), 0.999)
    torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-5)


def grpo_by_definition(scores: list[float], groups: list[int], by_std: bool) -> list[float]:
    advantages = []
    for score, group in zip(scores, groups, strict=True):
        peers = [s for s, g in zip(scores, groups, strict=True) if g == group]
        spread = statistics.stdev(peers) if len(peers) > 1 else 0.0
        centred = score - statistics.mean(peers)
        advantages.append(centred / (spread + 1e-6) if by_std else centred)
    return advantages


@settings(deadline=None, max_examples=30)
@given(
    scores=st.lists(st.floats(-3, 3), min_size=1, max_size=12),
    groups=st.lists(st.integers(-2, 10**12), min_size=12, max_size=12),
    by_std=st.booleans(),
)
def test_grpo_compares_within_a_group(scores: list[float], groups: list[int], by_std: bool) -> None:
    groups = [group % 3 for group in groups[: len(scores)]]
    _, mask = random_batch(len(scores), len(scores), 5)
    mask[:, 0] = 1
    rewards = mask.double() * torch.tensor(scores, dtype=torch.float64)[:, None] / mask.sum(1, keepdim=True)
    result = grpo(AdvantageInputs(rewards, mask, group_ids=torch.tensor(groups)), grpo_config(by_std))
    expected = torch.tensor(grpo_by_definition(rewards.sum(1).tolist(), groups, by_std), dtype=torch.float64)
    torch.testing.assert_close(result.advantages, expected[:, None] * mask, rtol=1e-6, atol=1e-8)
    assert torch.equal(result.returns, result.advantages)


@pytest.mark.parametrize("by_std", [True, False])
@pytest.mark.parametrize("score", [1 / 7, 1e4 / 3])
def test_a_group_that_says_nothing_moves_nothing(by_std: bool, score: float) -> None:
    """Equal rewards in float32, whose mean is not exact, and a group of one."""
    rewards = torch.tensor([score] * 7 + [0.3])[:, None]
    groups = torch.tensor([5] * 7 + [6])
    inputs = AdvantageInputs(rewards, torch.ones(8, 1), group_ids=groups)
    assert float(grpo(inputs, grpo_config(by_std)).advantages.abs().max()) < 1e-5


def test_grpo_does_not_depend_on_the_order_of_responses() -> None:
    rewards, groups = normal(3, 12, 1), torch.arange(12) % 4
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    straight, shuffled = (
        grpo(AdvantageInputs(r, torch.ones(12, 1), group_ids=g), grpo_config(True)).advantages
        for r, g in ((rewards, groups), (rewards[order], groups[order]))
    )
    torch.testing.assert_close(shuffled, straight[order])


def test_grpo_without_groups_says_so() -> None:
    with pytest.raises(ValueError, match="group_ids"):
        grpo(AdvantageInputs(torch.ones(1, 1), torch.ones(1, 1)), grpo_config(True))


def test_every_estimator_keeps_dtype_and_ignores_padding() -> None:
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    poison = torch.where(mask != 0, torch.ones(2, 3), torch.tensor(math.nan))
    inputs = AdvantageInputs(poison, mask, poison, torch.tensor([0, 0]), torch.tensor([0.5, 0.5]))
    for estimate in ADVANTAGES.values():
        result = estimate(inputs, gae_config(0.9, 0.9))
        for tensor in (result.advantages, result.returns):
            assert tensor.dtype == torch.float32
            assert torch.isfinite(tensor).all()
            assert not tensor[mask == 0].any()
