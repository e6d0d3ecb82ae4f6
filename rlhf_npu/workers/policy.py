"""The trained policy: old log-probabilities, and the clipped policy update."""

from __future__ import annotations

from functools import partial

import torch
from tensordict import TensorDict

from rlhf_npu.algorithms.aggregation import BatchTotals, aggregate, masked_sum
from rlhf_npu.algorithms.kl import KL_ESTIMATORS
from rlhf_npu.algorithms.policy_losses import clipped_policy_loss
from rlhf_npu.algorithms.token_probs import entropy_from_logits, log_probs_from_logits
from rlhf_npu.config import ActorConfig
from rlhf_npu.engines.trainer_engine import MicroLoss, TrainerEngine, infer
from rlhf_npu.workers.mini_batches import mean_over_steps, train_epochs
from rlhf_npu.workers.rollout_batch import model_inputs, trim


def response_logits(model: torch.nn.Module, batch: TensorDict) -> torch.Tensor:
    """Logits (B, R, V) that predict each response token of a trimmed batch."""
    width = batch["responses"].shape[1]
    logits = model(**model_inputs(batch), use_cache=False, logits_to_keep=width + 1).logits
    return logits[:, :-1]


def response_log_probs(model: torch.nn.Module, batch: TensorDict, temperature: float) -> torch.Tensor:
    """Log-probabilities (B, R) of the response tokens at `temperature`, 0 where the response has ended.

    The batch is trimmed for the forward pass; the result has the batch's own R.
    """
    micro_batch = trim(batch)
    log_probs = log_probs_from_logits(response_logits(model, micro_batch), micro_batch["responses"], temperature)
    missing = batch["responses"].shape[1] - log_probs.shape[1]
    return torch.nn.functional.pad(log_probs * micro_batch["response_mask"], (0, missing))


class PolicyTrainer:
    """The actor: a causal language model trained with the clipped objective of PPO."""

    def __init__(self, engine: TrainerEngine, config: ActorConfig, temperature: float, horizon: int) -> None:
        self.engine = engine
        self._config = config
        self._temperature = temperature
        self._horizon = horizon

    def log_probs(self, batch: TensorDict, micro_size: int) -> torch.Tensor:
        """Log-probabilities (B, R) of the responses under the present weights."""
        forward = partial(response_log_probs, temperature=self._temperature)
        return infer(self.engine.module, batch, micro_size, forward)

    def update(self, batch: TensorDict, mini_batch_size: int) -> dict[str, float]:
        """Train on `batch`; `mini_batch_size` counts this rank's sequences of an optimizer step.

        Returns:
            `actor/*` metrics, means over all optimizer steps; `actor/ppo_kl_first` is that of the first step,
            before any change of weights.
        """
        steps = train_epochs(self.engine, batch, self._loss, self._config, mini_batch_size, self._horizon)
        return mean_over_steps(steps, "actor") | {"actor/ppo_kl_first": steps[0]["ppo_kl"]}

    def _loss(self, model: torch.nn.Module, batch: TensorDict, totals: BatchTotals) -> MicroLoss:
        config = self._config
        micro_batch = trim(batch)
        mask = micro_batch["response_mask"]
        logits = response_logits(model, micro_batch)
        log_probs = log_probs_from_logits(logits, micro_batch["responses"], self._temperature)
        policy = clipped_policy_loss(
            log_probs,
            micro_batch["old_log_probs"],
            micro_batch["advantages"],
            config.clip_ratio_low,
            config.clip_ratio_high,
            config.clip_ratio_c,
        )
        pg_loss = aggregate(policy.loss, mask, config.loss_agg_mode, totals)
        loss, sums = pg_loss, {"pg_loss": pg_loss}
        with torch.set_grad_enabled(config.entropy_coeff != 0):
            entropy = entropy_from_logits(logits, self._temperature)
            sums["entropy"] = masked_sum(entropy, mask) / totals.tokens
        if config.entropy_coeff:
            loss = loss - config.entropy_coeff * aggregate(entropy, mask, config.loss_agg_mode, totals)
        if config.use_kl_loss:
            kl = KL_ESTIMATORS[config.kl_loss_type](log_probs, micro_batch["ref_log_probs"])
            sums["kl_loss"] = aggregate(kl, mask, config.loss_agg_mode, totals)
            loss = loss + config.kl_loss_coef * sums["kl_loss"]
        sums |= {name: masked_sum(value, mask) / totals.tokens for name, value in policy.metrics.items()}
        return MicroLoss(loss, sums)
