"""How a rank's sequences are cut into mini-batches whose gradients do not depend on the cut."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Protocol

import torch
from tensordict import TensorDict

from rlhf_npu.algorithms.aggregation import BatchTotals
from rlhf_npu.config import ActorConfig, CriticConfig
from rlhf_npu.engines.collectives import all_reduce
from rlhf_npu.engines.trainer_engine import MicroLoss, TrainerEngine


class LossShare(Protocol):
    """The loss of a micro-batch, as a share of that of the mini-batch whose totals are given."""

    def __call__(self, model: torch.nn.Module, batch: TensorDict, totals: BatchTotals) -> MicroLoss: ...


def train_epochs(
    engine: TrainerEngine,
    batch: TensorDict,
    loss_share: LossShare,
    config: ActorConfig | CriticConfig,
    mini_batch_size: int,
    horizon: int,
) -> list[dict[str, float]]:
    """Take one optimizer step on each mini-batch, `config.ppo_epochs` times over.

    Args:
        batch: this rank's sequences.
        loss_share: a micro-batch's share of the loss.
        mini_batch_size: sequences of an optimizer step on this rank.
        horizon: tokens of a response at most, for losses normalised by it.

    Returns:
        the metrics of each optimizer step.
    """
    steps = []
    for mini_batch in mini_batches(batch, mini_batch_size, config.ppo_epochs):
        loss_of = partial(loss_share, totals=mini_batch_totals(mini_batch, horizon))
        steps.append(engine.train_mini_batch(mini_batch.split(config.ppo_micro_batch_size_per_device), loss_of))
    return steps


def mean_over_steps(steps: list[dict[str, float]], prefix: str) -> dict[str, float]:
    """Each metric's mean over optimizer steps, named `prefix/name`."""
    return {f"{prefix}/{name}": sum(step[name] for step in steps) / len(steps) for name in steps[0]}


def mini_batches(batch: TensorDict, size: int, epochs: int) -> Iterator[TensorDict]:
    """This rank's mini-batches of `size` sequences, `epochs` times over.

    The driver deals prompts out to ranks in turn, so the k-th mini-batches of all ranks hold the k-th run of
    prompts of the global batch, however many ranks there are.
    """
    for _ in range(epochs):
        yield from batch.split(size)


def mini_batch_totals(mini_batch: TensorDict, horizon: int) -> BatchTotals:
    """Trained tokens and all sequences of a mini-batch over all ranks, which call this together."""
    mask = mini_batch["loss_mask"]
    totals = all_reduce(torch.stack([mask.sum().double(), mask.new_tensor(len(mask), dtype=torch.float64)]))
    return BatchTotals(tokens=max(1.0, float(totals[0])), sequences=float(totals[1]), horizon=horizon)
