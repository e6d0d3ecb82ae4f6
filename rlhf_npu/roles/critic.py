"""The critic: values of states, and the clipped value update."""

from __future__ import annotations

import torch
from tensordict import TensorDict

from rlhf_npu.algorithms.aggregation import BatchTotals, aggregate, masked_sum
from rlhf_npu.algorithms.value_losses import clipped_value_loss
from rlhf_npu.config import CriticConfig
from rlhf_npu.engines.trainer_engine import MicroLoss, TrainerEngine, infer
from rlhf_npu.roles.mini_batches import mean_over_steps, train_epochs
from rlhf_npu.roles.rollout_batch import model_inputs, trim


def response_values(model: torch.nn.Module, batch: TensorDict) -> torch.Tensor:
    """Values (B, R) of the state before each response token of a trimmed batch."""
    width = batch["responses"].shape[1]
    values: torch.Tensor = model(**model_inputs(batch))
    return values[:, -width - 1 : -1].float()


def padded_values(model: torch.nn.Module, batch: TensorDict) -> torch.Tensor:
    """`response_values`, 0 where the response has ended; the result has the batch's own R."""
    micro_batch = trim(batch)
    values = response_values(model, micro_batch) * micro_batch["response_mask"]
    return torch.nn.functional.pad(values, (0, batch["responses"].shape[1] - values.shape[1]))


class CriticTrainer:
    """A value model trained with the clipped value loss of PPO."""

    def __init__(self, engine: TrainerEngine, config: CriticConfig, horizon: int) -> None:
        self.engine = engine
        self._config = config
        self._horizon = horizon

    def values(self, batch: TensorDict) -> torch.Tensor:
        """Values (B, R) under the present weights."""
        return infer(self.engine.module, batch, self._config.ppo_micro_batch_size_per_device, padded_values)

    def update(self, batch: TensorDict, mini_batch_size: int) -> dict[str, float]:
        """Train on `batch`; `mini_batch_size` counts this rank's sequences of an optimizer step.

        Returns:
            `critic/*` metrics, means over all optimizer steps.
        """
        steps = train_epochs(self.engine, batch, self._loss, self._config, mini_batch_size, self._horizon)
        return mean_over_steps(steps, "critic")

    def _loss(self, model: torch.nn.Module, batch: TensorDict, totals: BatchTotals) -> MicroLoss:
        micro_batch = trim(batch)
        mask = micro_batch["loss_mask"]
        values = response_values(model, micro_batch)
        value_loss = clipped_value_loss(
            values, micro_batch["values"], micro_batch["returns"], self._config.cliprange_value
        )
        loss = aggregate(value_loss.loss, mask, self._config.loss_agg_mode, totals)
        sums = {name: masked_sum(value, mask) / totals.tokens for name, value in value_loss.metrics.items()}
        sums |= {"vf_loss": loss, "vpred_mean": masked_sum(values, mask) / totals.tokens}
        return MicroLoss(loss, sums)
