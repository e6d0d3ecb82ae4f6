"""The frozen reference policy that KL terms are measured against."""

from __future__ import annotations

from functools import partial

import torch
from tensordict import TensorDict

from rlhf_npu.config import RefConfig
from rlhf_npu.engines.trainer_engine import InferenceEngine, infer
from rlhf_npu.roles.policy import response_log_probs


class Reference:
    """The policy as it was before training."""

    def __init__(self, engine: InferenceEngine, config: RefConfig, temperature: float) -> None:
        self.engine = engine
        self._micro_size = config.log_prob_micro_batch_size_per_device
        self._forward = partial(response_log_probs, temperature=temperature)

    def log_probs(self, batch: TensorDict) -> torch.Tensor:
        """Log-probabilities (B, R) of the responses."""
        return infer(self.engine.module, batch, self._micro_size, self._forward)
