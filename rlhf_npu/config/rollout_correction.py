"""Correction of the policy loss for what the rollout sampled with other probabilities than the trainer's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rlhf_npu.config.keys import POSITIVE, ConfigNode, Problem, key

REJECTIONS = (
    "token_k1",
    "token_k2",
    "token_k3",
    "seq_sum_k1",
    "seq_sum_k2",
    "seq_sum_k3",
    "seq_mean_k1",
    "seq_mean_k2",
    "seq_mean_k3",
    "seq_max_k2",
    "seq_max_k3",
)


@dataclass
class RolloutCorrectionConfig(ConfigNode):
    """Importance weights and rejection by the ratio r of the trainer's probability of a token to the rollout's."""

    rollout_is: str | None = key(
        "weigh the loss by r: token, or sequence = product over a response; null = off",
        None,
        choices=("token", "sequence"),
    )
    rollout_is_threshold: float = key("a weight is at most this", 2.0, within=POSITIVE)
    rollout_is_threshold_lower: float | None = key(
        "weights outside of [this, rollout_is_threshold] become 0; null = only truncate", None, within=POSITIVE
    )
    rollout_is_batch_normalize: bool = key("divide the weights by their mean over the batch", False)
    rollout_rs: str | None = key(
        "leave tokens, or whole responses (seq_*), out whose divergence is outside of the bounds; null = off",
        None,
        choices=REJECTIONS,
        elsewhere={"token": "token_k1", "sequence": "seq_sum_k1", "geometric": "seq_mean_k1"},
    )
    rollout_rs_threshold: float | None = key("k1: r at most; k2, k3: divergence at most", None, within=POSITIVE)
    rollout_rs_threshold_lower: float | None = key("k1: r at least; null = 1 / threshold", None, within=POSITIVE)

    def relations(self) -> Iterator[Problem]:
        lower, upper = self.rollout_is_threshold_lower, self.rollout_is_threshold
        if lower is not None and lower > upper:
            yield Problem("rollout_is_threshold_lower", lower, f"must be at most rollout_is_threshold={upper:g}")
        if self.rollout_rs is not None:
            yield from self._rejection_problems(self.rollout_rs)

    def _rejection_problems(self, rejection: str) -> Iterator[Problem]:
        lower, upper = self.rollout_rs_threshold_lower, self.rollout_rs_threshold
        if upper is None:
            yield Problem("rollout_rs_threshold", None, f"rollout_rs={rejection} needs a bound")
        elif not rejection.endswith("_k1"):
            if lower is not None:
                yield Problem(
                    "rollout_rs_threshold_lower", lower, f"rollout_rs={rejection} has no lower bound; set null"
                )
        elif (1 / upper if lower is None else lower) > upper:
            yield Problem(
                "rollout_rs_threshold", upper, "must be at least the lower bound, which is its reciprocal if null"
            )
