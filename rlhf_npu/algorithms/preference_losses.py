"""Losses on preferences: of pairs of completions, and of single completions that are desirable or not.

A completion's log-probability is the sum over its trained tokens. With log-ratio log pi - log pi_ref the margin of a
pair is the chosen completion's less the rejected one's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_npu.algorithms.token_ratios import MAX_LOG_RATIO
from rlhf_npu.config import preference_loss
from rlhf_npu.config.preference_loss import WITH_DIVERGENCE, PreferenceLossConfig

__all__ = ["PAIR_LOSSES", "REFERENCE_FREE", "PairInputs", "UnpairedInputs", "kto_loss", "pair_metrics"]

REFERENCE_FREE = frozenset(preference_loss.REFERENCE_FREE)
"""Losses that need no reference."""
PER_TOKEN = frozenset(("ipo", "simpo", "orpo"))
"""Losses whose log-probabilities are means over tokens."""
DISCOPOP_TEMPERATURE = 0.05


@dataclass(frozen=True)
class PairInputs:
    """What losses may use of P pairs, (P,) each.

    Attributes:
        chosen, rejected: log-probabilities under the policy that is trained; the gradient goes here.
        ref_chosen, ref_rejected: under the reference; zeros where the loss needs none.
        chosen_tokens, rejected_tokens: trained tokens of each, at least 1.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @property
    def chosen_log_ratio(self) -> Tensor:
        """log pi - log pi_ref of the chosen completions, (P,)."""
        return self.chosen - self.ref_chosen

    @property
    def rejected_log_ratio(self) -> Tensor:
        """log pi - log pi_ref of the rejected completions, (P,)."""
        return self.rejected - self.ref_rejected

    @property
    def margin(self) -> Tensor:
        """The chosen completions' log-ratios less the rejected ones', (P,)."""
        return self.chosen_log_ratio - self.rejected_log_ratio


@dataclass(frozen=True)
class UnpairedInputs:
    """What losses may use of N single completions.

    Attributes:
        policy: (N,) log-probabilities under the policy that is trained; the gradient goes here.
        ref: (N,) under the reference.
        desirable: (N,) bool.
        kl: () estimate of KL(pi || pi_ref) from the batch, not negative, without a gradient.
    """

    policy: Tensor
    ref: Tensor
    desirable: Tensor
    kl: Tensor


PairLoss = Callable[[PairInputs, PreferenceLossConfig], Tensor]


def dpo(inputs: PairInputs, config: PreferenceLossConfig) -> Tensor:
    """Rafailov et al. 2023 (arXiv 2305.18290, eq. 7): -log sigmoid(beta margin)."""
    return -logsigmoid(_logit(inputs, config))


def cdpo(inputs: PairInputs, config: PreferenceLossConfig) -> Tensor:
    """Conservative DPO (Mitchell 2023): the expected DPO loss of labels of which a share e is wrong.

    -(1 - e) log sigmoid(beta margin) - e log sigmoid(-beta margin), e being label_smoothing.
    """
    logit, wrong = _logit(inputs, config), config.label_smoothing
    return -(1 - wrong) * logsigmoid(logit) - wrong * logsigmoid(-logit)


def robust(inputs: PairInputs, config: PreferenceLossConfig) -> Tensor:
    """Robust DPO (Chowdhury et al. 2024, arXiv 2403.00409): without bias where a share e of labels is wrong.

    (-(1 - e) log sigmoid(beta margin) + e log sigmoid(-beta margin)) / (1 - 2 e).
    """
    logit, wrong = _logit(inputs, config), config.label_smoothing
    return (-(1 - wrong) * logsigmoid(logit) + wrong * logsigmoid(-logit)) / (1 - 2 * wrong)


def ipo(inputs: PairInputs, config: PreferenceLossConfig) -> Tensor:
    """Azar et al. 2023 (arXiv 2310.12036, eq. 17) of log-ratios a token: (margin - 1 / (2 beta))^2."""
    chosen = inputs.chosen_log_ratio / inputs.chosen_tokens
    rejected = inputs.rejected_log_ratio / inputs.rejected_tokens
    return (chosen - rejected - 0.5 / config.beta).square()


def ipo_sum(inputs: PairInputs, config: PreferenceLossConfig) -> Tensor:
    """Azar et al. 2023 (arXiv 2310.12036, eq. 17) of log-ratios summed over tokens: (margin - 1 / (2 beta))^2."""
    return (inputs.margin - 0.5 / config.beta).square()


def hinge(inputs: PairInputs, config: PreferenceLossConfig) -> Tensor:
    """Hinge loss of SLiC (Zhao et al. 2023, arXiv 2305.10425) as RSO normalizes it (arXiv 2309.06657)."""
    return (1 - config.beta * inputs.margin).relu()


def apo_zero(inputs: PairInputs, config: PreferenceLossConfig) -> Tensor:
    """Anchored preference optimization (D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7), plus 1.

    sigmoid(-beta log-ratio of chosen) + sigmoid(beta log-ratio of rejected), for chosen answers better than the
    policy's.
    """
    return (-config.beta * inputs.chosen_log_ratio).sigmoid() + (config.beta * inputs.rejected_log_ratio).sigmoid()


def apo_down(inputs: PairInputs, config: PreferenceLossConfig) -> Tensor:
    """Anchored preference optimization (D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 8), plus 1.

    sigmoid(beta log-ratio of chosen) + sigmoid(-beta margin): for chosen answers worse than the policy's.
    """
    return (config.beta * inputs.chosen_log_ratio).sigmoid() + (-config.beta * inputs.margin).sigmoid()


def nca_pair(inputs: PairInputs, config: PreferenceLossConfig) -> Tensor:
    """Noise contrastive alignment of two answers, rewards 1 and 0 (Chen et al. 2024, arXiv 2402.05369)."""
    chosen, rejected = config.beta * inputs.chosen_log_ratio, config.beta * inputs.rejected_log_ratio
    return -logsigmoid(chosen) - 0.5 * (logsigmoid(-chosen) + logsigmoid(-rejected))


def exo_pair(inputs: PairInputs, config: PreferenceLossConfig) -> Tensor:
    """Efficient exact optimization (Ji et al. 2024, arXiv 2402.00856, eq. 16): KL(q || p) over the pair.

    q = (sigmoid(beta margin), sigmoid(-beta margin)) and p = (1 - e, e), e being label_smoothing.
    """
    logit, wrong = config.beta * inputs.margin, config.label_smoothing
    right = logit.sigmoid() * (logsigmoid(logit) - math.log1p(-wrong))
    return right + (-logit).sigmoid() * (logsigmoid(-logit) - math.log(wrong))


def discopop(inputs: PairInputs, config: PreferenceLossConfig) -> Tensor:
    """The loss found by Lu et al. 2024 (arXiv 2406.08414, eq. 5): logistic and exponential, mixed.

    With x = beta margin and s = sigmoid(x / 0.05): -(1 - s) log sigmoid(x) + s exp(-x), the second as
    exp(log s - x), which never overflows.
    """
    logit = config.beta * inputs.margin
    logistic = -logsigmoid(logit) * (-logit / DISCOPOP_TEMPERATURE).sigmoid()
    return logistic + (logsigmoid(logit / DISCOPOP_TEMPERATURE) - logit).exp()


def sppo_hard(inputs: PairInputs, config: PreferenceLossConfig) -> Tensor:
    """Self-play preference optimization (Wu et al. 2024, arXiv 2405.00675, eq. 4.7), winning probabilities 1 and 0.

    (log-ratio of chosen - 1 / (2 beta))^2 + (log-ratio of rejected + 1 / (2 beta))^2; beta is the paper's 1 / eta.
    """
    target = 0.5 / config.beta
    return (inputs.chosen_log_ratio - target).square() + (inputs.rejected_log_ratio + target).square()


def simpo(inputs: PairInputs, config: PreferenceLossConfig) -> Tensor:
    """Meng et al. 2024 (arXiv 2405.14734, eq. 6): -log sigmoid(beta (difference of log-probs a token) - gamma)."""
    difference = inputs.chosen / inputs.chosen_tokens - inputs.rejected / inputs.rejected_tokens
    return -logsigmoid(config.beta * difference - config.simpo_gamma)


def orpo(inputs: PairInputs, config: PreferenceLossConfig) -> Tensor:
    """Hong et al. 2024 (arXiv 2403.07691): the chosen's NLL a token - beta log sigmoid(log odds ratio).

    The odds are p / (1 - p) with p the geometric mean of a completion's token probabilities.
    """
    chosen, rejected = inputs.chosen / inputs.chosen_tokens, inputs.rejected / inputs.rejected_tokens
    return -chosen - config.beta * logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def cpo(inputs: PairInputs, config: PreferenceLossConfig) -> Tensor:
    """Xu et al. 2024 (arXiv 2401.08417): DPO with a uniform reference; rpo_alpha weighs its likelihood term."""
    return -logsigmoid(config.beta * (inputs.chosen - inputs.rejected))


def kto_loss(inputs: UnpairedInputs, config: PreferenceLossConfig) -> Tensor:
    """Ethayarajh et al. 2024 (arXiv 2402.01306): weight times sigmoid(beta (kl - log-ratio)), (N,).

    For undesirable completions the sign turns: sigmoid(beta (log-ratio - kl)).
    """
    surplus = config.beta * (inputs.policy - inputs.ref - inputs.kl.detach())
    return torch.where(
        inputs.desirable,
        config.desirable_weight * (-surplus).sigmoid(),
        config.undesirable_weight * surplus.sigmoid(),
    )


def pair_metrics(inputs: PairInputs, config: PreferenceLossConfig) -> dict[str, Tensor]:
    """TRL's metrics, (P,) each and without gradients.

    `rewards/*` are implicit rewards, beta times what the loss compares: log-ratios, or log-probabilities where there is
    no reference, summed or a token (`PER_TOKEN`) as the loss has them. `logps/*` are sums.
    """
    chosen, rejected = (reward.detach() for reward in _rewards(inputs, config))
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).to(chosen),
        "logps/chosen": inputs.chosen.detach(),
        "logps/rejected": inputs.rejected.detach(),
    }


def _rewards(inputs: PairInputs, config: PreferenceLossConfig) -> tuple[Tensor, Tensor]:
    chosen, rejected = inputs.chosen_log_ratio, inputs.rejected_log_ratio
    if config.loss_type in REFERENCE_FREE:
        chosen, rejected = inputs.chosen, inputs.rejected
    if config.loss_type in PER_TOKEN:
        chosen, rejected = chosen / inputs.chosen_tokens, rejected / inputs.rejected_tokens
    if config.loss_type in WITH_DIVERGENCE:
        chosen, rejected = _paid(chosen, config), _paid(rejected, config)
    return config.beta * chosen, config.beta * rejected


def _logit(inputs: PairInputs, config: PreferenceLossConfig) -> Tensor:
    """beta (f'(u of chosen) - f'(u of rejected))."""
    return config.beta * (_paid(inputs.chosen_log_ratio, config) - _paid(inputs.rejected_log_ratio, config))


def _paid(log_ratio: Tensor, config: PreferenceLossConfig) -> Tensor:
    """f'(u) - f'(1) of the divergence's f at u = pi / pi_ref (Wang et al. 2023, arXiv 2309.16240).

    log u; 1 - 1 / u; log(2 u / (1 + u)); (1 - u^-alpha) / alpha. Powers of 1 / u are held below e^20, without a
    gradient beyond.
    """
    if config.f_divergence_type == "reverse_kl":
        return log_ratio
    if config.f_divergence_type == "js_divergence":
        return logsigmoid(log_ratio) + math.log(2)
    alpha = 1.0 if config.f_divergence_type == "forward_kl" else config.f_alpha_divergence_coef
    return -(-alpha * log_ratio).clamp(max=MAX_LOG_RATIO).expm1() / alpha


def _log_odds(log_prob: Tensor) -> Tensor:
    """log(p / (1 - p)); p is held below 1 by the type's precision, without a gradient beyond."""
    log_prob = log_prob.clamp(max=-torch.finfo(log_prob.dtype).eps)
    return log_prob - _log1mexp(log_prob)


def _log1mexp(value: Tensor) -> Tensor:
    """log(1 - exp(value)) for value < 0; Maechler 2012, "Accurately computing log(1 - exp(-|a|))"."""
    return torch.where(value > -math.log(2), (-value.expm1()).log(), (-value.exp()).log1p())


def _with_likelihood(loss: PairLoss, inputs: PairInputs, config: PreferenceLossConfig) -> Tensor:
    """The loss, and rpo_alpha times the chosen's NLL a token (Pang et al. 2024, arXiv 2404.19733)."""
    if config.rpo_alpha is None:
        return loss(inputs, config)
    return loss(inputs, config) - config.rpo_alpha * inputs.chosen / inputs.chosen_tokens


_OWN_LOSSES = (
    *(dpo, cdpo, robust, ipo, ipo_sum, hinge, apo_zero, apo_down, nca_pair, exo_pair, discopop, sppo_hard),
    *(simpo, orpo, cpo),
)
PAIR_LOSSES: dict[str, PairLoss] = {loss.__name__: partial(_with_likelihood, loss) for loss in _OWN_LOSSES}
"""The values of `loss.loss_type` that learn from pairs: (P,) losses, `rpo_alpha`'s term included."""
