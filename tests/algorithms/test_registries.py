"""A value that the configuration accepts is one that the algorithms know, and the other way round."""

from __future__ import annotations

from rlhf_npu.algorithms.advantages import ADVANTAGES
from rlhf_npu.algorithms.aggregation import AGGREGATIONS
from rlhf_npu.algorithms.kl import KL_ESTIMATORS
from rlhf_npu.algorithms.policy_losses import POLICY_LOSSES
from rlhf_npu.config.actor_rollout_ref import KL_ESTIMATOR_NAMES, LOSS_AGG_MODES
from rlhf_npu.config.algorithm import AlgorithmConfig
from rlhf_npu.config.policy_loss import LOSS_MODES


def test_estimators_aggregations_and_divergences() -> None:
    assert sorted(AGGREGATIONS) == sorted(LOSS_AGG_MODES)
    assert sorted(KL_ESTIMATORS) == sorted(KL_ESTIMATOR_NAMES)
    choices = AlgorithmConfig.__dataclass_fields__["adv_estimator"].metadata["choices"]
    assert sorted(ADVANTAGES) == sorted(choices)
    assert sorted(POLICY_LOSSES) == sorted(LOSS_MODES)
