"""From rewards to advantages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from rlhf_npu.config.actor_rollout_ref import KL_ESTIMATOR_NAMES, KL_ESTIMATORS_ELSEWHERE
from rlhf_npu.config.keys import FRACTION, NOT_NEGATIVE, POSITIVE, ConfigNode, Problem, key
from rlhf_npu.config.rollout_correction import RolloutCorrectionConfig

OF_GROUPS = ("grpo", "rloo", "reinforce_plus_plus_baseline", "opo", "gpg", "pass_at_k")
"""Estimators that compare the responses to one prompt."""
ESTIMATORS_ELSEWHERE = {
    "ppo": "gae",
    "group_norm": "grpo",
    "grpo_vectorized": "grpo",
    "rloo_vectorized": "rloo",
    "grpo_passk": "pass_at_k",
    "reinforce": "reinforce_plus_plus",
    "reinforce_baseline": "reinforce_plus_plus_baseline",
}


@dataclass
class KLControlConfig(ConfigNode):
    """Coefficient of the KL penalty in the reward; adaptive as in Ziegler et al. 2019, section 2.2."""

    type: str = key("how the coefficient moves", "fixed", choices=("fixed", "adaptive"))
    kl_coef: float = key("the coefficient, at the start if adaptive", 0.001, within=NOT_NEGATIVE)
    horizon: int = key("adaptive: sequences over which it adapts", 10000, within=POSITIVE)
    target_kl: float = key("adaptive: KL a sequence that it aims at, in nats", 0.1, within=POSITIVE)


@dataclass
class FilterGroupsConfig(ConfigNode):
    """DAPO's dynamic sampling: prompts whose responses are all worth the same are replaced by others."""

    enable: bool = key("train on prompts alone whose responses differ in the metric", False)
    metric: str = key("score, or a part of what the reward function returns, such as acc", "score")
    max_num_gen_batches: int = key(
        "batches of data.train_batch_size prompts generated a step at most; then others fill up", 10, within=POSITIVE
    )

    def relations(self) -> Iterator[Problem]:
        if self.metric in ("seq_reward", "seq_final_reward"):
            right = "must be score, which is the reward before penalties, or a part that the reward function returns"
            yield Problem("metric", self.metric, right)


@dataclass
class AlgorithmConfig(ConfigNode):
    """From rewards to advantages: GAE with a critic, or an estimator without; docs/algorithms.md has the formulas."""

    adv_estimator: str = key(
        "gae = PPO with a critic, grpo = rewards relative to the prompt's group; see docs/algorithms.md",
        choices=("gae", "reinforce_plus_plus", "remax", *OF_GROUPS),
        elsewhere=ESTIMATORS_ELSEWHERE,
    )
    gamma: float = key("gae, reinforce_plus_plus: discount a token", 1.0, within=FRACTION)
    lam: float = key("lambda of GAE", 1.0, within=FRACTION)
    norm_adv_by_std_in_grpo: bool = key(
        "grpo, pass_at_k: divide by the group's standard deviation; false = Dr. GRPO", True
    )
    whiten_advantages: bool = key("GAE: mean 0 and variance 1 over the batch's response tokens", True)
    use_kl_in_reward: bool = key("subtract KL against the reference from token rewards", False)
    kl_penalty: str = key("estimator of that KL", "k1", choices=KL_ESTIMATOR_NAMES, elsewhere=KL_ESTIMATORS_ELSEWHERE)
    kl_ctrl: KLControlConfig = field(default_factory=KLControlConfig)
    rollout_correction: RolloutCorrectionConfig = field(default_factory=RolloutCorrectionConfig)
    filter_groups: FilterGroupsConfig = field(default_factory=FilterGroupsConfig)
    mask_truncated_completions: bool = key("train on no response that met data.max_response_length", False)
