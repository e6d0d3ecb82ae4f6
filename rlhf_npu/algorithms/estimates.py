"""What advantage estimators take and give."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlhf_npu.algorithms.aggregation import AllReduce, identity


@dataclass(frozen=True)
class AdvantageInputs:
    """What estimators may use of a batch of B sequences and T response positions.

    Attributes:
        token_level_rewards: (B, T).
        response_mask: (B, T), 1 at response tokens. What other tensors hold elsewhere is ignored, inside a response
            too, where tools or observations may have written.
        values: (B, T), the critic's value of the state before each token; None without a critic.
        group_ids: (B,), equal for the responses to one prompt, which are all on one rank; None if nothing is grouped.
        baselines: (B,), the reward of the greedy response to the same prompt; None without.
        all_reduce: sums over ranks, for estimators that normalize over the whole batch.
    """

    token_level_rewards: Tensor
    response_mask: Tensor
    values: Tensor | None = None
    group_ids: Tensor | None = None
    baselines: Tensor | None = None
    all_reduce: AllReduce = identity


@dataclass(frozen=True)
class Advantages:
    """Advantages, and the returns a critic learns; both (B, T), 0 where there is no response token."""

    advantages: Tensor
    returns: Tensor


def sequence_rewards(inputs: AdvantageInputs) -> Tensor:
    """Each response's whole reward (B,), in float64 on the host.

    They are few numbers; in float32 a group's equal rewards would leave a rest that a small deviation blows up.
    """
    tokens = inputs.response_mask != 0
    return inputs.token_level_rewards.masked_fill(~tokens, 0).sum(1).cpu().double()


def spread(sequence_values: Tensor, inputs: AdvantageInputs) -> Tensor:
    """(B,) values at each response token, (B, T), 0 elsewhere."""
    tokens = inputs.response_mask != 0
    return sequence_values.to(inputs.token_level_rewards)[:, None] * tokens
