"""Advantage estimators by name: from token rewards to how much better each token was than expected."""

from __future__ import annotations

from collections.abc import Callable

from rlhf_npu.algorithms.estimates import AdvantageInputs, Advantages
from rlhf_npu.algorithms.gae import gae
from rlhf_npu.algorithms.group_advantages import gpg, grpo, opo, pass_at_k, rloo
from rlhf_npu.algorithms.reinforce import reinforce_plus_plus, reinforce_plus_plus_baseline, remax
from rlhf_npu.config import AlgorithmConfig

__all__ = ["ADVANTAGES", "AdvantageInputs", "Advantages"]

ADVANTAGES: dict[str, Callable[[AdvantageInputs, AlgorithmConfig], Advantages]] = {
    "gae": gae,
    "grpo": grpo,
    "rloo": rloo,
    "reinforce_plus_plus": reinforce_plus_plus,
    "reinforce_plus_plus_baseline": reinforce_plus_plus_baseline,
    "remax": remax,
    "opo": opo,
    "gpg": gpg,
    "pass_at_k": pass_at_k,
}
"""The values of `algorithm.adv_estimator`."""
