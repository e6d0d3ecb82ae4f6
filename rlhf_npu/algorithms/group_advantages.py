"""Estimators that compare the responses to one prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_npu.algorithms.estimates import AdvantageInputs, Advantages, sequence_rewards, spread
from rlhf_npu.config import AlgorithmConfig

_STD_EPSILON = 1e-6


@dataclass(frozen=True)
class Groups:
    """Which responses answer the same prompt; everything in float64 on the host.

    Attributes:
        index: (B,), each response's group, from 0.
        size: (G,), responses of each group.
    """

    index: Tensor
    size: Tensor

    def mean(self, values: Tensor) -> Tensor:
        """Its group's mean of `values` (B,), for each response."""
        return self.sum(values) / self.size[self.index]

    def sum(self, values: Tensor) -> Tensor:
        """Its group's sum of `values` (B,), for each response."""
        return torch.bincount(self.index, values)[self.index]

    def max(self, values: Tensor) -> Tensor:
        """Its group's largest of `values` (B,), for each response."""
        largest = torch.full_like(self.size, -torch.inf)
        return largest.scatter_reduce(0, self.index, values, "amax")[self.index]

    def std(self, centred: Tensor) -> Tensor:
        """Its group's sample standard deviation, for each response, from deviations (B,); 0 in a group of one."""
        variance = torch.bincount(self.index, centred.square()) / (self.size - 1).clamp(min=1)
        return variance.sqrt()[self.index]


def groups_of(inputs: AdvantageInputs, estimator: str) -> Groups:
    """The groups of a batch.

    Raises:
        ValueError: the batch has no groups.
    """
    if inputs.group_ids is None:
        raise ValueError(f"{estimator} needs group_ids, the prompt that each response belongs to")
    _, index = torch.unique(inputs.group_ids.cpu(), return_inverse=True)
    return Groups(index, torch.bincount(index).double())


@torch.no_grad()
def grpo(inputs: AdvantageInputs, config: AlgorithmConfig) -> Advantages:
    """Group-relative advantages (Shao et al. 2024, arXiv 2402.03300, section 4.1.2).

    A response's advantage is its reward less its group's mean, over its group's sample standard deviation
    (plus 1e-6) if `norm_adv_by_std_in_grpo`; without, it is Dr. GRPO's (Liu et al. 2025, arXiv 2503.20783).
    A group of one, and one whose rewards are all equal, says nothing about what is better: its advantages
    are 0.
    """
    groups = groups_of(inputs, "grpo")
    rewards = sequence_rewards(inputs)
    advantages = rewards - groups.mean(rewards)
    if config.norm_adv_by_std_in_grpo:
        advantages = advantages / (groups.std(advantages) + _STD_EPSILON)
    return _outcome(advantages, inputs)


@torch.no_grad()
def rloo(inputs: AdvantageInputs, config: AlgorithmConfig) -> Advantages:  # noqa: ARG001
    """REINFORCE leave-one-out (Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740).

    A response's baseline is the mean reward of the others: A_i = r_i - sum_{j != i} r_j / (n - 1), which is
    n / (n - 1) times the distance from the group's mean. A group of one has nothing to be compared with: 0.
    """
    groups = groups_of(inputs, "rloo")
    rewards = sequence_rewards(inputs)
    others = (groups.size - 1).clamp(min=1)
    scale = (groups.size / others)[groups.index]
    return _outcome((rewards - groups.mean(rewards)) * scale, inputs)


@torch.no_grad()
def opo(inputs: AdvantageInputs, config: AlgorithmConfig) -> Advantages:  # noqa: ARG001
    """On-policy RL with the optimal baseline (Hao et al. 2025, arXiv 2505.23585).

    A_i = r_i - sum_j l_j r_j / sum_j l_j over the group, l_j being the tokens of response j: the baseline of
    least variance if a response's squared gradient grows as its length. A group of one gets 0.
    """
    groups = groups_of(inputs, "opo")
    rewards, lengths = sequence_rewards(inputs), (inputs.response_mask != 0).sum(1).cpu().double()
    baselines = groups.sum(lengths * rewards) / groups.sum(lengths).clamp(min=1)
    return _outcome(_where_compared(rewards - baselines, groups), inputs)


@torch.no_grad()
def gpg(inputs: AdvantageInputs, config: AlgorithmConfig) -> Advantages:  # noqa: ARG001
    """Group policy gradient (Chu et al. 2025, arXiv 2504.02546, eq. 6 to 8).

    A_i = alpha (r_i - mean) with alpha = B / (B - M), where M of the batch's B responses, over all ranks, are in
    groups whose rewards are all equal and so add nothing: the others count for them. 0 if that is all of them.
    """
    groups = groups_of(inputs, "gpg")
    rewards = sequence_rewards(inputs)
    centred = rewards - groups.mean(rewards)
    telling = groups.std(centred) > _STD_EPSILON
    counts = inputs.token_level_rewards.new_tensor([float(len(rewards)), float(telling.sum())])
    total, told = inputs.all_reduce(counts).tolist()
    return _outcome(centred * (total / max(1.0, told)) * telling, inputs)


@torch.no_grad()
def pass_at_k(inputs: AdvantageInputs, config: AlgorithmConfig) -> Advantages:
    """Group-relative advantages for pass@k (Tang et al. 2025, arXiv 2503.19595), k being the group's size.

    The group's value is its best reward. Only the best response changes it, by what it exceeds the second best:
    that is its advantage, over the group's standard deviation (plus 1e-6) if `norm_adv_by_std_in_grpo`; that of all
    others is 0, and so it is of several that are equally good, and in a group of one.
    """
    groups = groups_of(inputs, "pass_at_k")
    rewards = sequence_rewards(inputs)
    best = groups.max(rewards)
    is_best = rewards == best
    second = groups.max(rewards.masked_fill(is_best, -torch.inf))
    gains = is_best & (groups.sum(is_best.double()) == 1) & second.isfinite()
    advantages = torch.where(gains, best - second, 0.0)
    if config.norm_adv_by_std_in_grpo:
        advantages = advantages / (groups.std(rewards - groups.mean(rewards)) + _STD_EPSILON)
    return _outcome(advantages, inputs)


def _where_compared(advantages: Tensor, groups: Groups) -> Tensor:
    return advantages.masked_fill(groups.size[groups.index] == 1, 0)


def _outcome(advantages: Tensor, inputs: AdvantageInputs) -> Advantages:
    tokens = spread(advantages, inputs)
    return Advantages(tokens, tokens)
