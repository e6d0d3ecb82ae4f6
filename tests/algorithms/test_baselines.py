"""Estimators without a critic, against their formulas in plain Python."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from rlhf_npu.algorithms.advantages import ADVANTAGES, AdvantageInputs, Advantages
from rlhf_npu.algorithms.aggregation import Ranks
from rlhf_npu.config import AlgorithmConfig
from tests.algorithms import references
from tests.algorithms.ragged import holed_batch, normal, random_batch
from tests.algorithms.together import run_together

OF_GROUPS: dict[str, references.Estimator] = {
    "grpo": references.grpo,
    "rloo": references.rloo,
    "opo": references.opo,
    "gpg": references.gpg,
    "pass_at_k": references.pass_at_k,
}


def estimate(name: str, inputs: AdvantageInputs, gamma: float = 1.0, by_std: bool = True) -> Advantages:
    config = AlgorithmConfig(adv_estimator=name, gamma=gamma, norm_adv_by_std_in_grpo=by_std)
    return ADVANTAGES[name](inputs, config)


def assert_rows(result: Tensor, mask: Tensor, expected: references.Rows) -> None:
    assert not result[mask == 0].any()
    for got, wanted in zip(references.dense(result, mask), expected, strict=True):
        assert got == pytest.approx(wanted, rel=1e-6, abs=1e-9)


def batch(seed: int, holes: bool) -> tuple[Tensor, Tensor, list[int]]:
    """Rewards whose groups are of one to five responses, one group without a difference."""
    rewards, mask = (holed_batch if holes else random_batch)(seed, 14, 9)
    groups = [7, 7, 7, 3, 3, 9, 1, 1, 1, 1, 1, 5, 5, 5]
    mask[11:, 0] = 1
    rewards[11:] = torch.where(mask[11:] != 0, 0.0, torch.nan)
    rewards[11:, 0] = 1 / 7
    return rewards, mask, groups


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", sorted(OF_GROUPS))
def test_estimators_of_groups_are_their_formulas(name: str, seed: int, holes: bool) -> None:
    rewards, mask, groups = batch(seed, holes)
    result = estimate(name, AdvantageInputs(rewards, mask, group_ids=torch.tensor(groups)))
    assert_rows(result.advantages, mask, OF_GROUPS[name](references.dense(rewards, mask), groups))
    assert torch.equal(result.returns, result.advantages)


@pytest.mark.parametrize("name", ["grpo", "pass_at_k"])
def test_the_deviation_can_be_left_out(name: str) -> None:
    rewards, mask, groups = batch(1, holes=True)
    result = estimate(name, AdvantageInputs(rewards, mask, group_ids=torch.tensor(groups)), by_std=False)
    reference = partial(references.grpo if name == "grpo" else references.pass_at_k, by_std=False)
    assert_rows(result.advantages, mask, reference(references.dense(rewards, mask), groups))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rloo", [4 / 3, 0, -4 / 3, 0]),
        ("opo", [7 / 6, 1 / 6, -5 / 6, 1 / 6]),
        ("gpg", [2, 0, -2, 0]),
        ("pass_at_k", [1, 0, 0, 0]),
    ],
)
def test_by_hand(name: str, expected: list[float]) -> None:
    """Rewards 2, 1, 0, 1 of 1, 2, 2, 1 tokens; for gpg beside as many responses that say nothing."""
    mask = torch.tensor([[1.0, 0], [1, 1], [1, 1], [1, 0]])
    rewards = torch.tensor([[2.0, 0], [0, 1], [0, 0], [1, 0]])
    ids = torch.tensor([4, 4, 4, 4])
    if name == "gpg":
        mask, rewards, ids = torch.cat([mask, mask]), torch.cat([rewards, torch.zeros(4, 2)]), torch.arange(8) // 4
    result = estimate(name, AdvantageInputs(rewards, mask, group_ids=ids), by_std=False)
    assert result.advantages[:4, 0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("name", sorted(OF_GROUPS))
def test_the_order_of_responses_does_not_matter(name: str) -> None:
    rewards, groups = normal(3, 12, 1), torch.arange(12) % 4
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    straight, shuffled = (
        estimate(name, AdvantageInputs(r, torch.ones(12, 1), group_ids=g)).advantages
        for r, g in ((rewards, groups), (rewards[order], groups[order]))
    )
    torch.testing.assert_close(shuffled, straight[order])


@pytest.mark.parametrize("name", [*sorted(OF_GROUPS), "reinforce_plus_plus_baseline", "remax", "gae"])
def test_what_is_missing_is_named(name: str) -> None:
    missing = {"gae": "critic", "remax": "baselines"}.get(name, f"{name} needs group_ids")
    with pytest.raises(ValueError, match=missing):
        estimate(name, AdvantageInputs(torch.ones(1, 1), torch.ones(1, 1)))


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_reinforce_plus_plus_whitens_returns(gamma: float, holes: bool) -> None:
    rewards, mask, _ = batch(2, holes)
    result = estimate("reinforce_plus_plus", AdvantageInputs(rewards, mask), gamma)
    expected = references.returns(references.dense(rewards, mask), gamma)
    assert_rows(result.returns, mask, expected)
    assert_rows(result.advantages, mask, references.whitened(expected))


@pytest.mark.parametrize("holes", [False, True])
def test_reinforce_plus_plus_baseline_whitens_what_exceeds_the_group(holes: bool) -> None:
    rewards, mask, groups = batch(5, holes)
    result = estimate("reinforce_plus_plus_baseline", AdvantageInputs(rewards, mask, group_ids=torch.tensor(groups)))
    centred = references.grpo(references.dense(rewards, mask), groups, by_std=False)
    assert_rows(result.advantages, mask, references.whitened(centred))


@pytest.mark.parametrize("holes", [False, True])
def test_remax_takes_the_greedy_reward_off_the_rest_of_the_rewards(holes: bool) -> None:
    rewards, mask, _ = batch(6, holes)
    baselines = normal(8, 14)
    result = estimate("remax", AdvantageInputs(rewards, mask, baselines=baselines), gamma=0.5)
    sums = references.returns(references.dense(rewards, mask), 1.0)
    assert_rows(result.returns, mask, sums)
    off = [[value - b for value in row] for row, b in zip(sums, baselines.tolist(), strict=True)]
    assert_rows(result.advantages, mask, off)


@pytest.mark.parametrize("name", ["gpg", "reinforce_plus_plus", "reinforce_plus_plus_baseline"])
def test_ranks_normalize_as_one_batch_would_be(name: str) -> None:
    rewards, mask, groups = batch(7, holes=True)
    whole = AdvantageInputs(rewards, mask, group_ids=torch.tensor(groups))

    def part(rows: slice, ranks: Ranks) -> Tensor:
        own = AdvantageInputs(
            rewards[rows], mask[rows], group_ids=torch.tensor(groups)[rows], all_reduce=ranks.all_reduce
        )
        return estimate(name, own).advantages

    parts = run_together([partial(part, slice(0, 6)), partial(part, slice(6, None))])
    torch.testing.assert_close(torch.cat(parts), estimate(name, whole).advantages, rtol=1e-9, atol=1e-12)
