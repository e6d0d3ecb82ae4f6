"""Each loss against its paper's formula, once more in numpy and float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_npu.algorithms.preference_losses import (
    PAIR_LOSSES,
    REFERENCE_FREE,
    PairInputs,
    UnpairedInputs,
    kto_loss,
    pair_metrics,
)
from rlhf_npu.config.preference_loss import F_DIVERGENCE_TYPES, PAIR_LOSS_TYPES, PreferenceLossConfig
from tests.algorithms.ragged import normal

Formula = Callable[..., np.ndarray]
PAIRS = 24


def pairs(seed: int = 0, scale: float = 3.0) -> PairInputs:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 40, (2, PAIRS), generator=generator).double()
    log_probs = -tokens * torch.rand(2, PAIRS, generator=generator, dtype=torch.float64) - 0.01
    reference = log_probs + scale * torch.randn(2, PAIRS, generator=generator, dtype=torch.float64)
    return PairInputs(log_probs[0], log_probs[1], reference[0], reference[1], tokens[0], tokens[1])


def config_of(loss_type: str, **keys: Any) -> PreferenceLossConfig:
    """A configuration that passes its own checks."""
    if loss_type in ("cdpo", "robust", "exo_pair"):
        keys.setdefault("label_smoothing", 0.2)
    if loss_type == "cpo":
        keys.setdefault("rpo_alpha", 1.0)
    config = PreferenceLossConfig(loss_type=loss_type, **keys)
    assert not config.problems()
    return config


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0, -x)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def odds(p: np.ndarray) -> np.ndarray:
    return p / (1 - p)


# w and r are log pi / pi_ref of chosen and rejected, pw and pr log pi, nw and nr lengths, b beta, e label_smoothing.
FORMULAS: dict[str, Formula] = {
    "dpo": lambda w, r, b, **_: -np.log(sigmoid(b * (w - r))),
    "cdpo": lambda w, r, b, e, **_: -(1 - e) * np.log(sigmoid(b * (w - r))) - e * np.log(sigmoid(b * (r - w))),
    "robust": lambda w, r, b, e, **_: (
        (-(1 - e) * np.log(sigmoid(b * (w - r))) + e * np.log(sigmoid(b * (r - w)))) / (1 - 2 * e)
    ),
    "ipo": lambda w, r, nw, nr, b, **_: (w / nw - r / nr - 1 / (2 * b)) ** 2,
    "ipo_sum": lambda w, r, b, **_: (w - r - 1 / (2 * b)) ** 2,
    "hinge": lambda w, r, b, **_: np.maximum(0, 1 - b * (w - r)),
    "apo_zero": lambda w, r, b, **_: 1 - sigmoid(b * w) + sigmoid(b * r),
    "apo_down": lambda w, r, b, **_: sigmoid(b * w) + 1 - sigmoid(b * (w - r)),
    "nca_pair": lambda w, r, b, **_: -np.log(sigmoid(b * w)) - (np.log(sigmoid(-b * w)) + np.log(sigmoid(-b * r))) / 2,
    "exo_pair": lambda w, r, b, e, **_: (
        sigmoid(b * (w - r)) * np.log(sigmoid(b * (w - r)) / (1 - e))
        + sigmoid(b * (r - w)) * np.log(sigmoid(b * (r - w)) / e)
    ),
    "discopop": lambda w, r, b, **_: (
        -(1 - sigmoid(b * (w - r) / 0.05)) * np.log(sigmoid(b * (w - r)))
        + sigmoid(b * (w - r) / 0.05) * np.exp(-b * (w - r))
    ),
    "sppo_hard": lambda w, r, b, **_: (w - 1 / (2 * b)) ** 2 + (r + 1 / (2 * b)) ** 2,
    "simpo": lambda pw, pr, nw, nr, b, gamma, **_: -np.log(sigmoid(b / nw * pw - b / nr * pr - gamma)),
    "orpo": lambda pw, pr, nw, nr, b, **_: (
        -pw / nw - b * np.log(sigmoid(np.log(odds(np.exp(pw / nw)) / odds(np.exp(pr / nr)))))
    ),
    "cpo": lambda pw, pr, nw, b, **_: -np.log(sigmoid(b * (pw - pr))) - pw / nw,
}
# f'(u) of each divergence's f, from the paper's table.
DERIVATIVES: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "reverse_kl": lambda u, alpha: np.log(u) + 1,
    "forward_kl": lambda u, alpha: -1 / u,
    "js_divergence": lambda u, alpha: np.log(2 * u / (1 + u)),
    "alpha_divergence": lambda u, alpha: (1 - u**-alpha) / alpha,
}


def by_formula(inputs: PairInputs, config: PreferenceLossConfig) -> np.ndarray:
    chosen, rejected, ref_chosen, ref_rejected, nw, nr = (getattr(inputs, f.name).numpy() for f in fields(inputs))
    return FORMULAS[config.loss_type](
        w=chosen - ref_chosen,
        r=rejected - ref_rejected,
        pw=chosen,
        pr=rejected,
        nw=nw,
        nr=nr,
        b=config.beta,
        e=config.label_smoothing,
        gamma=config.simpo_gamma,
    )


def test_the_configuration_and_the_losses_know_the_same_names() -> None:
    assert sorted(PAIR_LOSSES) == sorted(PAIR_LOSS_TYPES) == sorted(FORMULAS)
    assert sorted(DERIVATIVES) == sorted(F_DIVERGENCE_TYPES)
    assert PAIR_LOSSES.keys() >= REFERENCE_FREE


@pytest.mark.parametrize("beta", [0.05, 0.1, 2.0])
@pytest.mark.parametrize("loss_type", PAIR_LOSS_TYPES)
def test_a_loss_is_its_papers(loss_type: str, beta: float) -> None:
    inputs, config = pairs(), config_of(loss_type, beta=beta)
    loss = PAIR_LOSSES[loss_type](inputs, config)
    assert loss.shape == (PAIRS,)
    np.testing.assert_allclose(loss.numpy(), by_formula(inputs, config), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss_type", ["dpo", "cdpo", "robust"])
@pytest.mark.parametrize("divergence", F_DIVERGENCE_TYPES)
def test_another_divergence_replaces_the_log_ratio_by_its_derivative(loss_type: str, divergence: str) -> None:
    inputs, alpha = pairs(scale=1.0), 0.3
    more = {"f_alpha_divergence_coef": alpha} if divergence == "alpha_divergence" else {}
    config = config_of(loss_type, f_divergence_type=divergence, **more)
    paid = [
        DERIVATIVES[divergence](np.exp(ratio.numpy()), alpha)
        for ratio in (inputs.chosen_log_ratio, inputs.rejected_log_ratio)
    ]
    expected = FORMULAS[loss_type](w=paid[0], r=paid[1], b=config.beta, e=config.label_smoothing)
    np.testing.assert_allclose(PAIR_LOSSES[loss_type](inputs, config).numpy(), expected, rtol=1e-9, atol=1e-12)


def test_the_alpha_divergence_lies_between_the_two_kl_divergences() -> None:
    inputs = pairs(scale=1.0)

    def loss(divergence: str, **keys: float) -> Tensor:
        return PAIR_LOSSES["dpo"](inputs, config_of("dpo", f_divergence_type=divergence, **keys))

    nearly = {0: "reverse_kl", 1: "forward_kl"}
    for limit, divergence in nearly.items():
        close = loss("alpha_divergence", f_alpha_divergence_coef=abs(limit - 1e-7))
        torch.testing.assert_close(close, loss(divergence), rtol=0, atol=1e-5)


def test_dpos_gradient_is_the_papers() -> None:
    """-beta sigmoid(-beta margin) to the chosen completion, the opposite to the rejected one (eq. 7's gradient)."""
    inputs, config = pairs(), config_of("dpo")
    chosen, rejected = (value.float().requires_grad_() for value in (inputs.chosen, inputs.rejected))
    PAIR_LOSSES["dpo"](replace(inputs, chosen=chosen, rejected=rejected), config).sum().backward()
    margin = (inputs.chosen - inputs.ref_chosen - inputs.rejected + inputs.ref_rejected).numpy()
    expected = -config.beta * sigmoid(-config.beta * margin)
    assert chosen.grad is not None
    assert rejected.grad is not None
    np.testing.assert_allclose(chosen.grad.numpy(), expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(rejected.grad.numpy(), -expected, rtol=0, atol=1e-6)


def test_dpo_of_the_reference_itself_is_log_2() -> None:
    inputs = pairs()
    same = replace(inputs, ref_chosen=inputs.chosen, ref_rejected=inputs.rejected)
    for divergence in F_DIVERGENCE_TYPES:
        loss = PAIR_LOSSES["dpo"](same, config_of("dpo", f_divergence_type=divergence))
        torch.testing.assert_close(loss, torch.full_like(loss, math.log(2)))


def test_values_worked_out_by_hand() -> None:
    """Log-ratios 2 and -3 with lengths 4 and 2, beta 0.5."""
    one = [torch.tensor([value], dtype=torch.float64) for value in (-8.0, -6.0, -10.0, -3.0, 4.0, 2.0)]
    expected = {
        "dpo": math.log1p(math.exp(-2.5)),
        "ipo": (0.5 + 1.5 - 1) ** 2,
        "ipo_sum": (5 - 1) ** 2,
        "hinge": 0.0,
        "sppo_hard": (2 - 1) ** 2 + (-3 + 1) ** 2,
        "simpo": math.log1p(math.exp(-(0.5 * (-2 + 3) - 0.5))),
        "orpo": 2 + 0.5 * math.log1p((math.exp(2) - 1) / (math.exp(3) - 1)),
    }
    for loss_type, value in expected.items():
        assert PAIR_LOSSES[loss_type](PairInputs(*one), config_of(loss_type, beta=0.5)).item() == pytest.approx(value)


@pytest.mark.parametrize("loss_type", [name for name in PAIR_LOSS_TYPES if name != "orpo"])
def test_rpo_adds_the_chosens_likelihood(loss_type: str) -> None:
    inputs, one, three = pairs(), config_of(loss_type, rpo_alpha=1.0), config_of(loss_type, rpo_alpha=3.0)
    added = PAIR_LOSSES[loss_type](inputs, three) - PAIR_LOSSES[loss_type](inputs, one)
    torch.testing.assert_close(added, -2 * inputs.chosen / inputs.chosen_tokens)


def test_smoothed_losses_under_swapped_labels() -> None:
    """cDPO expects wrong labels; the robust loss is what remains of DPO's when they are averaged out."""
    inputs, wrong = pairs(), 0.2
    swapped = PairInputs(
        inputs.rejected,
        inputs.chosen,
        inputs.ref_rejected,
        inputs.ref_chosen,
        inputs.rejected_tokens,
        inputs.chosen_tokens,
    )
    dpo = [PAIR_LOSSES["dpo"](each, config_of("dpo")) for each in (inputs, swapped)]
    robust = [PAIR_LOSSES["robust"](each, config_of("robust")) for each in (inputs, swapped)]
    cdpo = PAIR_LOSSES["cdpo"](inputs, config_of("cdpo"))
    torch.testing.assert_close(cdpo, (1 - wrong) * dpo[0] + wrong * dpo[1])
    torch.testing.assert_close((1 - wrong) * robust[0] + wrong * robust[1], dpo[0])


@pytest.mark.parametrize("loss_type", PAIR_LOSS_TYPES)
def test_gradients(loss_type: str) -> None:
    inputs, config = pairs(1), config_of(loss_type)

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        return PAIR_LOSSES[loss_type](replace(inputs, chosen=chosen, rejected=rejected), config)

    assert torch.autograd.gradcheck(loss, (inputs.chosen.requires_grad_(), inputs.rejected.requires_grad_()))


@pytest.mark.parametrize("divergence", F_DIVERGENCE_TYPES)
def test_gradients_of_divergences(divergence: str) -> None:
    inputs, config = pairs(1), config_of("dpo", f_divergence_type=divergence)

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        return PAIR_LOSSES["dpo"](replace(inputs, chosen=chosen, rejected=rejected), config)

    assert torch.autograd.gradcheck(loss, (inputs.chosen.requires_grad_(), inputs.rejected.requires_grad_()))


@pytest.mark.parametrize(
    ("loss_type", "divergence"),
    [*((name, "reverse_kl") for name in PAIR_LOSS_TYPES), *(("dpo", name) for name in F_DIVERGENCE_TYPES)],
)
def test_far_from_the_reference_nothing_overflows(loss_type: str, divergence: str) -> None:
    """Float32, completions of 1 to 10,000 tokens, log-probabilities from 0 to -10,000 on every side."""
    sides = torch.tensor([[a, b, c, d] for a in (0, -1e4) for b in (0, -1e4) for c in (0, -1e4) for d in (0, -1e4)])
    chosen, rejected = (sides[:, side].clone().requires_grad_() for side in (0, 1))
    config = config_of(loss_type, f_divergence_type=divergence)
    for tokens in (1.0, 1e4):
        lengths = torch.full((len(sides),), tokens)
        inputs = PairInputs(chosen, rejected, sides[:, 2], sides[:, 3], lengths, lengths)
        loss = PAIR_LOSSES[loss_type](inputs, config)
        gradients = torch.autograd.grad(loss.sum(), (chosen, rejected))
        assert torch.isfinite(loss).all()
        assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("loss_type", ["dpo", "cdpo", "robust", "hinge"])
def test_a_pair_that_is_utterly_wrong_still_pulls(loss_type: str) -> None:
    far = torch.tensor([-1e4], requires_grad=True)
    zero, one = torch.zeros(1), torch.ones(1)
    PAIR_LOSSES[loss_type](PairInputs(far, zero, zero, zero, one, one), config_of(loss_type)).backward()
    assert far.grad is not None
    smoothing = {"cdpo": 0.8, "robust": 0.8 / 0.6}.get(loss_type, 1.0)
    assert far.grad.item() == pytest.approx(-0.1 * smoothing, rel=1e-6)


def test_metrics_are_trls() -> None:
    inputs = pairs()
    metrics = pair_metrics(inputs, config_of("dpo"))
    assert set(metrics) == {
        *(f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")),
        *(f"logps/{name}" for name in ("chosen", "rejected")),
    }
    torch.testing.assert_close(metrics["rewards/chosen"], 0.1 * (inputs.chosen - inputs.ref_chosen))
    torch.testing.assert_close(metrics["rewards/rejected"], 0.1 * (inputs.rejected - inputs.ref_rejected))
    torch.testing.assert_close(metrics["rewards/margins"], metrics["rewards/chosen"] - metrics["rewards/rejected"])
    assert metrics["rewards/accuracies"].tolist() == [float(value > 0) for value in metrics["rewards/margins"].tolist()]
    torch.testing.assert_close(metrics["logps/chosen"], inputs.chosen)


@pytest.mark.parametrize("loss_type", PAIR_LOSS_TYPES)
def test_metrics_tell_what_the_loss_compares_and_carry_no_gradient(loss_type: str) -> None:
    inputs = pairs()
    inputs.chosen.requires_grad_()
    metrics = pair_metrics(inputs, config_of(loss_type))
    assert not any(metric.requires_grad for metric in metrics.values())
    reference = 0 if loss_type in ("simpo", "orpo", "cpo") else inputs.ref_chosen
    length = inputs.chosen_tokens if loss_type in ("ipo", "simpo", "orpo") else 1
    torch.testing.assert_close(metrics["rewards/chosen"], 0.1 * (inputs.chosen.detach() - reference) / length)


def single(seed: int = 0) -> UnpairedInputs:
    policy, ref = normal(seed, PAIRS) * 5, normal(seed + 1, PAIRS) * 5
    return UnpairedInputs(policy, ref, torch.arange(PAIRS) % 3 > 0, torch.tensor(0.7, dtype=torch.float64))


def test_kto_is_its_papers() -> None:
    inputs = single()
    config = config_of("kto", desirable_weight=1.5, undesirable_weight=0.8)
    reward = (inputs.policy - inputs.ref).numpy()
    value = np.where(
        inputs.desirable.numpy(),
        1.5 * sigmoid(0.1 * (reward - 0.7)),
        0.8 * sigmoid(0.1 * (0.7 - reward)),
    )
    expected = np.where(inputs.desirable.numpy(), 1.5, 0.8) - value
    np.testing.assert_allclose(kto_loss(inputs, config).numpy(), expected, rtol=1e-9, atol=1e-12)


def test_ktos_gradient_leaves_the_kl_alone() -> None:
    inputs, config = single(), config_of("kto")
    kl = inputs.kl.clone().requires_grad_()

    def loss(policy: Tensor) -> Tensor:
        return kto_loss(replace(inputs, policy=policy, kl=kl), config)

    assert torch.autograd.gradcheck(loss, (inputs.policy.requires_grad_(),))
    loss(inputs.policy).sum().backward()
    assert kl.grad is None


def test_kto_far_from_the_reference() -> None:
    policy = torch.tensor([-1e4, 1e4, -1e4, 1e4], requires_grad=True)
    desirable = torch.tensor([True, True, False, False])
    loss = kto_loss(UnpairedInputs(policy, torch.zeros(4), desirable, torch.tensor(0.0)), config_of("kto"))
    loss.sum().backward()
    assert loss.tolist() == [1.0, 0.0, 0.0, 1.0]
    assert policy.grad is not None
    assert torch.isfinite(policy.grad).all()
