"""Which policy loss, and what only some of them need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rlhf_npu.config.keys import NOT_NEGATIVE, POSITIVE, ConfigNode, Problem, Range, key

LOSS_MODES = ("vanilla", "gspo", "cispo", "sapo", "geo_mean", "gpg", "clip_cov", "kl_cov")
LOSS_MODES_ELSEWHERE = {
    "dpo": "online_dpo",
    "ppo": "vanilla",
    "grpo": "vanilla",
    "gmpo": "geo_mean",
    "clip-cov": "clip_cov",
}
OF_PAIRS = ("online_dpo",)
"""Losses of the two responses to a prompt, which know no advantages."""
OF_SEQUENCES = ("gspo", "geo_mean", "sapo")
"""Losses whose papers count each response once: loss_agg_mode=seq-mean-token-mean."""
_SHARE = Range(above=0, at_most=1)


@dataclass
class PolicyLossConfig(ConfigNode):
    """The policy loss; docs/algorithms.md has the formulas."""

    loss_mode: str = key(
        "vanilla = PPO's clipped loss; see docs/algorithms.md",
        "vanilla",
        choices=(*LOSS_MODES, *OF_PAIRS),
        elsewhere=LOSS_MODES_ELSEWHERE,
    )
    clip_cov_ratio: float = key("clip_cov: share of tokens that get no gradient", 0.0002, within=_SHARE)
    clip_cov_lb: float = key("clip_cov: their covariance is above this", 1.0)
    clip_cov_ub: float = key("clip_cov: and below this", 5.0)
    kl_cov_ratio: float = key(
        "kl_cov: share of tokens, of largest covariance, that are penalized", 0.0002, within=_SHARE
    )
    dpo_beta: float = key("online_dpo: weight of the preference against the reference", 0.1, within=POSITIVE)
    ppo_kl_coef: float = key("kl_cov: weight of their penalty", 0.1, within=NOT_NEGATIVE)

    def relations(self) -> Iterator[Problem]:
        if self.clip_cov_lb >= self.clip_cov_ub:
            yield Problem("clip_cov_lb", self.clip_cov_lb, f"must be below clip_cov_ub={self.clip_cov_ub}")
