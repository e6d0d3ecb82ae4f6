"""Direct preference optimization of pairs that the policy itself has sampled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """P pairs of responses to the same prompts; all (P, 2).

    Attributes:
        log_probs: of the whole responses, under the policy that is trained; the gradient goes here.
        ref_log_probs: the same under the reference.
        rewards: of the responses.
    """

    log_probs: Tensor
    ref_log_probs: Tensor
    rewards: Tensor


@dataclass(frozen=True)
class PairLoss:
    """What is minimized, and what is reported; all (P,).

    Attributes:
        loss: 0 where none of the two is better.
        margin: beta times what the policy prefers the better one by, compared with the reference; no gradient.
        told: 1 where one is better.
    """

    loss: Tensor
    margin: Tensor
    told: Tensor


def online_dpo(pairs: Pairs, beta: float) -> PairLoss:
    """-log sigmoid(beta ((log p_w - log ref_w) - (log p_l - log ref_l))) of each pair, w having the higher reward.

    Rafailov et al. 2023 (arXiv 2305.18290, eq. 7), on pairs sampled in training as in Guo et al. 2024 (arXiv
    2402.04792).
    """
    better = torch.sign(pairs.rewards[:, 0] - pairs.rewards[:, 1])
    ratios = pairs.log_probs - pairs.ref_log_probs
    margin = beta * better * (ratios[:, 0] - ratios[:, 1])
    told = better.abs()
    return PairLoss(-torch.nn.functional.logsigmoid(margin) * told, margin.detach(), told)
