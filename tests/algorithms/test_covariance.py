"""Which tokens Clip-Cov and KL-Cov choose, in a whole mini-batch, wherever its parts are."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from rlhf_npu.algorithms.aggregation import Ranks
from rlhf_npu.algorithms.covariance import TOKEN_CHOICES
from rlhf_npu.algorithms.token_ratios import PolicyInputs
from rlhf_npu.config import ActorConfig, PolicyLossConfig
from tests.algorithms import references
from tests.algorithms.ragged import holed_batch, normal
from tests.algorithms.together import run_together

CONFIG = ActorConfig(
    policy_loss=PolicyLossConfig(clip_cov_ratio=0.1, clip_cov_lb=0.1, clip_cov_ub=2.0, kl_cov_ratio=0.1)
)


def inputs(rows: slice = slice(None), seed: int = 0, width: int = 20) -> PolicyInputs:
    log_probs, mask = holed_batch(seed, 16, width)
    parts = (log_probs[rows], log_probs[rows], normal(seed + 1, 16, width)[rows], mask[rows])
    return PolicyInputs(*parts)


def covariances(given: PolicyInputs) -> tuple[Tensor, Tensor]:
    """By their definition: those of all tokens, and where they are."""
    tokens = given.mask != 0
    values = references.covariances(given.log_prob[tokens].tolist(), given.advantages[tokens].tolist())
    return torch.tensor(values, dtype=torch.float64), tokens


def test_kl_cov_chooses_the_largest() -> None:
    given = inputs()
    chosen = TOKEN_CHOICES["kl_cov"](given, CONFIG, Ranks())
    values, tokens = covariances(given)
    count = int(0.1 * len(values))
    assert int(chosen.sum()) == count
    assert not chosen[~tokens].any()
    assert set(values[chosen[tokens] != 0].tolist()) == set(values.topk(count).values.tolist())


def test_clip_cov_draws_from_between_the_bounds() -> None:
    given = inputs(width=200)
    chosen = TOKEN_CHOICES["clip_cov"](given, CONFIG, Ranks())
    values, tokens = covariances(given)
    eligible = (values > 0.1) & (values < 2.0)
    drawn = chosen[tokens] != 0
    assert int(drawn.sum()) == int(0.1 * len(values)) < int(eligible.sum())
    assert not (drawn & ~eligible).any()
    # Not the largest nor the first ones: the draw knows neither.
    mean, spread = float(values[eligible].mean()), float(values[eligible].std())
    assert abs(float(values[drawn].mean()) - mean) < 4 * spread / len(values[drawn]) ** 0.5
    places = torch.arange(200).expand(16, 200)[tokens].double()
    middle, width = float(places[eligible].mean()), float(places[eligible].std())
    assert abs(float(places[drawn].mean()) - middle) < 4 * width / len(places[drawn]) ** 0.5


def test_all_are_chosen_where_few_are_eligible_and_none_where_none_is() -> None:
    given = inputs()
    values, tokens = covariances(given)
    few = ActorConfig(policy_loss=PolicyLossConfig(clip_cov_ratio=1.0, clip_cov_lb=1.0, clip_cov_ub=1.5))
    assert ((TOKEN_CHOICES["clip_cov"](given, few, Ranks())[tokens] != 0) == ((values > 1) & (values < 1.5))).all()
    none = ActorConfig(policy_loss=PolicyLossConfig(clip_cov_ratio=1.0, clip_cov_lb=90, clip_cov_ub=91))
    assert not TOKEN_CHOICES["clip_cov"](given, none, Ranks()).any()


@pytest.mark.parametrize("name", sorted(TOKEN_CHOICES))
@pytest.mark.parametrize("cut", [1, 8, 13])
def test_ranks_choose_as_one_would(name: str, cut: int) -> None:
    whole = TOKEN_CHOICES[name](inputs(), CONFIG, Ranks())
    parts = inputs(slice(0, cut)), inputs(slice(cut, None))
    chosen = run_together([partial(TOKEN_CHOICES[name], part, CONFIG) for part in parts])
    assert torch.equal(torch.cat(chosen), whole)
