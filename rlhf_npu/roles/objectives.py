"""What the offline loop trains on: each objective gives a micro-batch's share of the loss and of the metrics.

Shares of all micro-batches and ranks add up to the mean over the batch, so no gradient depends on the cut.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf_npu.algorithms.preference_losses import PAIR_LOSSES, PairInputs, UnpairedInputs, kto_loss, pair_metrics
from rlhf_npu.config import PreferenceLossConfig, RewardLossConfig
from rlhf_npu.engines.trainer_engine import MicroLoss
from rlhf_npu.roles.offline_batch import OfflineBatch, completion_sums, completion_tokens

Objective = Callable[[torch.nn.Module, OfflineBatch], MicroLoss]


def likelihood(model: torch.nn.Module, batch: OfflineBatch) -> MicroLoss:
    """The mean negative log-likelihood of the batch's trained tokens."""
    loss = -model(batch.packed).sum() / batch.totals.tokens
    return MicroLoss(loss, {"loss": loss})


def pairs(config: PreferenceLossConfig) -> Objective:
    """The mean over pairs of the loss that `config.loss_type` names."""
    loss_of = PAIR_LOSSES[config.loss_type]

    def objective(model: torch.nn.Module, batch: OfflineBatch) -> MicroLoss:
        inputs = _pair_inputs(model(batch.packed), batch)
        loss = loss_of(inputs, config).sum() / batch.totals.examples
        return _with_means(loss, pair_metrics(inputs, config), batch.totals.examples)

    return objective


def unpaired(config: PreferenceLossConfig) -> Objective:
    """KTO: the mean over completions, each desirable or not."""

    def objective(model: torch.nn.Module, batch: OfflineBatch) -> MicroLoss:
        assert batch.reference is not None
        assert batch.labels is not None
        assert batch.kl is not None
        policy = completion_sums(model(batch.packed), batch.packed)
        inputs = UnpairedInputs(policy, batch.reference, batch.labels, batch.kl)
        loss = kto_loss(inputs, config).sum() / batch.totals.examples
        rewards = config.beta * (policy - batch.reference).detach()
        metrics = {"rewards/desirable": rewards * batch.labels, "rewards/undesirable": rewards * ~batch.labels}
        metrics |= {"desirable": batch.labels.float(), "kl": batch.kl.expand_as(policy)}
        return _with_means(loss, metrics, batch.totals.examples)

    return objective


def bradley_terry(config: RewardLossConfig) -> Objective:
    """-log sigmoid(chosen - rejected - margin), the mean over pairs (Bradley and Terry 1952; margins: Llama 2)."""

    def objective(model: torch.nn.Module, batch: OfflineBatch) -> MicroLoss:
        chosen, rejected = model(batch.packed).unflatten(0, (-1, 2)).unbind(1)
        difference = chosen - rejected
        asked = 0.0 if batch.margins is None else batch.margins
        losses = -logsigmoid(difference - asked)
        if config.center_rewards_coefficient:
            losses = losses + config.center_rewards_coefficient * (chosen + rejected) ** 2
        metrics = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": difference,
            "rewards/accuracies": (difference > 0).float(),
        }
        return _with_means(losses.sum() / batch.totals.examples, metrics, batch.totals.examples)

    return objective


def _pair_inputs(log_probs: Tensor, batch: OfflineBatch) -> PairInputs:
    chosen, rejected = completion_sums(log_probs, batch.packed).unflatten(0, (-1, 2)).unbind(1)
    known = torch.zeros(batch.packed.rows, device=log_probs.device) if batch.reference is None else batch.reference
    ref_chosen, ref_rejected = known.unflatten(0, (-1, 2)).unbind(1)
    chosen_tokens, rejected_tokens = completion_tokens(batch.packed).unflatten(0, (-1, 2)).unbind(1)
    return PairInputs(chosen, rejected, ref_chosen, ref_rejected, chosen_tokens, rejected_tokens)


def _with_means(loss: Tensor, metrics: dict[str, Tensor], examples: int) -> MicroLoss:
    return MicroLoss(loss, {"loss": loss} | {name: value.detach().sum() / examples for name, value in metrics.items()})
