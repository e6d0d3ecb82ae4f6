"""From rewards to advantages."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlhf_npu.config.actor_rollout_ref import KL_ESTIMATOR_NAMES, KL_ESTIMATORS_ELSEWHERE
from rlhf_npu.config.keys import FRACTION, NOT_NEGATIVE, POSITIVE, ConfigNode, key


@dataclass
class KLControlConfig(ConfigNode):
    """Coefficient of the KL penalty in the reward; adaptive as in Ziegler et al. 2019, section 2.2."""

    type: str = key("how the coefficient moves", "fixed", choices=("fixed", "adaptive"))
    kl_coef: float = key("the coefficient, at the start if adaptive", 0.001, within=NOT_NEGATIVE)
    horizon: int = key("adaptive: sequences over which it adapts", 10000, within=POSITIVE)
    target_kl: float = key("adaptive: KL a sequence that it aims at, in nats", 0.1, within=POSITIVE)


@dataclass
class AlgorithmConfig(ConfigNode):
    """GAE (Schulman et al. 2016) with a critic, or GRPO (Shao et al. 2024) without."""

    adv_estimator: str = key(
        "gae = PPO with a critic, grpo = rewards relative to the prompt's group",
        choices=("gae", "grpo"),
        elsewhere={"ppo": "gae", "group_norm": "grpo"},
    )
    gamma: float = key("discount a token", 1.0, within=FRACTION)
    lam: float = key("lambda of GAE", 1.0, within=FRACTION)
    norm_adv_by_std_in_grpo: bool = key("divide by the group's standard deviation; false = Dr. GRPO", True)
    whiten_advantages: bool = key("GAE: mean 0 and variance 1 over the batch's response tokens", True)
    use_kl_in_reward: bool = key("subtract KL against the reference from token rewards", False)
    kl_penalty: str = key("estimator of that KL", "k1", choices=KL_ESTIMATOR_NAMES, elsewhere=KL_ESTIMATORS_ELSEWHERE)
    kl_ctrl: KLControlConfig = field(default_factory=KLControlConfig)
