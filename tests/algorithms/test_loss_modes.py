"""Every policy loss: its formula in plain Python, its gradient, and what a batch's cut must not change."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rlhf_npu.algorithms.aggregation import BatchTotals, aggregate
from rlhf_npu.algorithms.policy_losses import POLICY_LOSSES, PolicyInputs
from rlhf_npu.config import ActorConfig, PolicyLossConfig
from tests.algorithms import references
from tests.algorithms.ragged import holed_batch, normal

CONFIG = ActorConfig(
    clip_ratio_low=0.2,
    clip_ratio_high=0.3,
    clip_ratio_c=1.8,
    tau_pos=1.0,
    tau_neg=1.5,
    policy_loss=PolicyLossConfig(ppo_kl_coef=0.7),
)
LOW, HIGH = CONFIG.clip_ratio_low, CONFIG.clip_ratio_high


def inputs(seed: int = 0, of_sequences: bool = False) -> PolicyInputs:
    """Ratios on both sides of every bound; a mask with holes; NaN where nothing may be read of the advantages."""
    noise, mask = holed_batch(seed, 7, 6)
    old = -normal(seed + 1, 7, 6).abs() - 0.5
    advantages = normal(seed + 2, 7, 1).expand(7, 6) if of_sequences else normal(seed + 2, 7, 6)
    return PolicyInputs(
        log_prob=old + 0.5 * noise.nan_to_num(),
        old_log_prob=old,
        advantages=advantages,
        mask=mask,
        chosen=(normal(seed + 3, 7, 6) > 0.3).double() * mask,
    )


def ratio_and(token: Callable[[float, float, float, bool], float]) -> Callable[[PolicyInputs], references.Rows]:
    """The loss of each token from its ratio, advantage, log-probability, and whether it was chosen."""

    def rows(given: PolicyInputs) -> references.Rows:
        assert given.chosen is not None
        columns = (given.log_ratio, given.advantages, given.log_prob, given.chosen)
        parts = [references.dense(column, given.mask) for column in columns]
        return [
            [token(math.exp(log_ratio), a, logp, bool(c)) for log_ratio, a, logp, c in zip(*row, strict=True)]
            for row in zip(*parts, strict=True)
        ]

    return rows


def gspo(given: PolicyInputs) -> references.Rows:
    rows = []
    log_ratios, advantages = (references.dense(t, given.mask) for t in (given.log_ratio, given.advantages))
    for row, own in zip(log_ratios, advantages, strict=True):
        ratio = math.exp(sum(row) / len(row)) if row else 1.0
        rows.append([-references.ppo_objective(ratio, advantage, LOW, HIGH) for advantage in own])
    return rows


def geo_mean(given: PolicyInputs) -> references.Rows:
    log_ratios, advantages = (references.dense(t, given.mask) for t in (given.log_ratio, given.advantages))
    return [
        [-references.gmpo_objective(row, own[0], LOW, HIGH)] * len(row) if row else []
        for row, own in zip(log_ratios, advantages, strict=True)
    ]


def vanilla(ratio: float, a: float, logp: float, chosen: bool) -> float:
    objective = references.ppo_objective(ratio, a, LOW, HIGH)
    return -max(objective, CONFIG.clip_ratio_c * a) if a < 0 else -objective


FORMULAS: dict[str, Callable[[PolicyInputs], references.Rows]] = {
    "vanilla": ratio_and(vanilla),
    "cispo": ratio_and(lambda ratio, a, logp, chosen: -references.clip(ratio, 1 - LOW, 1 + HIGH) * a * logp),
    "sapo": ratio_and(lambda ratio, a, logp, chosen: -references.sapo_objective(ratio, a, 1.0, 1.5)),
    "gpg": ratio_and(lambda ratio, a, logp, chosen: -a * logp),
    "clip_cov": ratio_and(
        lambda ratio, a, logp, chosen: 0.0 if chosen else -references.ppo_objective(ratio, a, LOW, HIGH)
    ),
    "kl_cov": ratio_and(lambda ratio, a, logp, chosen: -ratio * a + chosen * 0.7 * abs(math.log(ratio))),
    "gspo": gspo,
    "geo_mean": geo_mean,
}


def test_every_loss_has_a_formula() -> None:
    assert FORMULAS.keys() == POLICY_LOSSES.keys()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mode", sorted(FORMULAS))
def test_losses_are_their_formulas(mode: str, seed: int) -> None:
    given = inputs(seed, of_sequences=mode == "geo_mean")
    loss = POLICY_LOSSES[mode](given, CONFIG).loss
    for got, wanted in zip(references.dense(loss, given.mask), FORMULAS[mode](given), strict=True):
        assert got == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def scalar(mode: str, given: PolicyInputs, config: ActorConfig = CONFIG) -> Callable[[Tensor], Tensor]:
    totals = BatchTotals(tokens=float(given.mask.sum()), sequences=len(given.mask), horizon=6)

    def of(log_prob: Tensor) -> Tensor:
        loss = POLICY_LOSSES[mode](replace(given, log_prob=log_prob), config).loss
        return aggregate(loss, given.mask, "seq-mean-token-mean", totals)

    return of


@pytest.mark.parametrize("mode", sorted(FORMULAS))
def test_gradcheck(mode: str) -> None:
    """With the weights of cispo, which carry no gradient, at their bounds, where they do not move."""
    given = inputs(4, of_sequences=True)
    if mode == "cispo":
        given = replace(given, log_prob=given.old_log_prob + given.log_ratio.sign())
    assert torch.autograd.gradcheck(scalar(mode, given), given.log_prob.clone().requires_grad_())


@pytest.mark.parametrize("mode", sorted(FORMULAS))
def test_on_policy_the_gradient_is_reinforce(mode: str) -> None:
    """At ratio 1, and with no token chosen, all of them go the way of the policy gradient, at its rate."""
    given = inputs(5, of_sequences=True)
    given = replace(given, log_prob=given.old_log_prob, chosen=torch.zeros_like(given.mask))
    log_prob = given.log_prob.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(scalar(mode, given)(log_prob), log_prob)
    lengths = given.mask.sum(1, keepdim=True).clamp(min=1)
    expected = -given.advantages * given.mask / lengths / len(given.mask)
    torch.testing.assert_close(gradient, expected.double(), rtol=1e-9, atol=1e-12)


def test_cispo_keeps_the_gradient_of_a_clipped_token() -> None:
    """Ratio 3 and advantage 2: PPO stops there, CISPO goes on at the bound's weight."""
    log_prob = torch.tensor([[math.log(3.0)]], dtype=torch.float64, requires_grad=True)
    given = PolicyInputs(log_prob, torch.zeros(1, 1), torch.full((1, 1), 2.0), torch.ones(1, 1))
    for mode, expected in (("cispo", -2 * 1.3), ("vanilla", 0.0)):
        result = POLICY_LOSSES[mode](given, CONFIG)
        assert float(torch.autograd.grad(result.loss.sum(), log_prob)[0]) == pytest.approx(expected)
        assert float(result.metrics["pg_clipfrac"]) == 1


def test_gspo_clips_whole_responses() -> None:
    """Ratios e and 1 of a response: their geometric mean is outside of the bounds, so none has a gradient."""
    log_prob = torch.tensor([[1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    given = PolicyInputs(log_prob, torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2))
    result = POLICY_LOSSES["gspo"](given, CONFIG)
    result.loss.sum().backward()
    assert log_prob.grad is not None
    assert log_prob.grad.tolist() == [[0.0, 0.0]]
    assert result.metrics["pg_clipfrac"].tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("mode", sorted(FORMULAS))
def test_shares_of_any_cut_add_up(mode: str) -> None:
    given = inputs(6, of_sequences=True)
    whole = scalar(mode, given)(given.log_prob)
    totals = BatchTotals(tokens=float(given.mask.sum()), sequences=len(given.mask), horizon=6)
    assert given.chosen is not None
    shares = []
    for rows in (slice(0, 3), slice(3, 4), slice(4, 7)):
        parts = (t[rows] for t in (given.log_prob, given.old_log_prob, given.advantages, given.mask, given.chosen))
        part = PolicyInputs(*parts)
        shares.append(aggregate(POLICY_LOSSES[mode](part, CONFIG).loss, part.mask, "seq-mean-token-mean", totals))
    torch.testing.assert_close(torch.stack(shares).sum(), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", sorted(FORMULAS))
def test_a_token_far_off_policy_cannot_overflow(mode: str) -> None:
    for log_ratio in (-2000.0, 2000.0):
        log_prob = torch.full((1, 3), log_ratio, requires_grad=True)
        ones = torch.ones(1, 3)
        result = POLICY_LOSSES[mode](PolicyInputs(log_prob, torch.zeros(1, 3), -ones, ones, ones), CONFIG)
        (gradient,) = torch.autograd.grad(result.loss.sum(), log_prob)
        assert torch.isfinite(result.loss).all()
        assert torch.isfinite(gradient).all()
        assert not any(metric.requires_grad for metric in result.metrics.values())


@pytest.mark.parametrize("mode", ["clip_cov", "kl_cov"])
def test_losses_of_chosen_tokens_need_the_choice(mode: str) -> None:
    with pytest.raises(ValueError, match="TOKEN_CHOICES"):
        POLICY_LOSSES[mode](replace(inputs(), chosen=None), CONFIG)
