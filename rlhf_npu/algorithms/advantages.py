"""Advantage estimators: from token rewards to how much better each token was than expected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf_npu.config import AlgorithmConfig

_STD_EPSILON = 1e-6


@dataclass(frozen=True)
class AdvantageInputs:
    """What estimators may use of a batch of B sequences and T response positions.

    Attributes:
        token_level_rewards: (B, T).
        response_mask: (B, T), 1 at response tokens. What other tensors hold elsewhere is ignored.
        values: (B, T), the critic's value of the state before each token; None without a critic.
        group_ids: (B,), equal for the responses to one prompt; None if nothing is grouped.
    """

    token_level_rewards: Tensor
    response_mask: Tensor
    values: Tensor | None = None
    group_ids: Tensor | None = None


@dataclass(frozen=True)
class Advantages:
    """Advantages, and the returns a critic learns; both (B, T), 0 where there is no response token."""

    advantages: Tensor
    returns: Tensor


@torch.no_grad()
def gae(inputs: AdvantageInputs, config: AlgorithmConfig) -> Advantages:
    """Generalized advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 11 to 16).

    delta_t = r_t + gamma V_{t+1} - V_t with V = 0 after the last token, A_t = sum_k (gamma lambda)^k
    delta_{t+k}, and the return is A_t + V_t. Tokens inside a response that the mask leaves out take no
    time: gamma and lambda apply from one response token to the next.
    """
    if inputs.values is None:
        raise ValueError("gae needs the critic's values; use grpo where there is no critic")
    order = torch.argsort((inputs.response_mask == 0).int(), dim=1, stable=True)
    tokens, rewards, values = (
        tensor.gather(1, order) for tensor in (inputs.response_mask != 0, inputs.token_level_rewards, inputs.values)
    )
    rewards, values = rewards.masked_fill(~tokens, 0), values.masked_fill(~tokens, 0)
    deltas = rewards + config.gamma * pad(values[:, 1:], (0, 1)) - values
    advantages = discounted_suffix_sums(deltas, config.gamma * config.lam).masked_fill(~tokens, 0)
    place = torch.zeros_like(advantages)
    return Advantages(
        place.scatter(1, order, advantages),
        place.scatter(1, order, (advantages + values).masked_fill(~tokens, 0)),
    )


@torch.no_grad()
def grpo(inputs: AdvantageInputs, config: AlgorithmConfig) -> Advantages:
    """Group-relative advantages (Shao et al. 2024, arXiv 2402.03300, section 4.1.2).

    A response's advantage is its reward less its group's mean, over its group's sample standard deviation
    (plus 1e-6) if `norm_adv_by_std_in_grpo`; without, it is Dr. GRPO's (Liu et al. 2025, arXiv 2503.20783).
    A group of one, and one whose rewards are all equal, says nothing about what is better: its advantages
    are 0.
    """
    if inputs.group_ids is None:
        raise ValueError("grpo needs group_ids, the prompt that each response belongs to")
    tokens = inputs.response_mask != 0
    # B numbers, in float64 on the host: with float32, equal rewards would leave a rest that 1e-6 blows up.
    rewards = inputs.token_level_rewards.masked_fill(~tokens, 0).sum(1).double().cpu()
    _, group = torch.unique(inputs.group_ids.cpu(), return_inverse=True)
    size = torch.bincount(group).double()
    advantages = rewards - (torch.bincount(group, rewards) / size)[group]
    if config.norm_adv_by_std_in_grpo:
        variance = torch.bincount(group, advantages.square()) / (size - 1).clamp(min=1)
        advantages = advantages / (variance.sqrt()[group] + _STD_EPSILON)
    spread = advantages.to(inputs.token_level_rewards)[:, None] * tokens
    return Advantages(spread, spread)


ADVANTAGES: dict[str, Callable[[AdvantageInputs, AlgorithmConfig], Advantages]] = {"gae": gae, "grpo": grpo}


def discounted_suffix_sums(values: Tensor, decay: float) -> Tensor:
    """(B, T) sums of decay^k values_{t+k} over k >= 0, in log2(T) passes that each double a sum's reach."""
    sums, reach = values.clone(), 1
    while reach < values.shape[1]:
        sums[:, :-reach] += decay**reach * sums[:, reach:]
        reach *= 2
    return sums
