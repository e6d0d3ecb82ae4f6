"""The trained policy: old log-probabilities, and the policy update."""

from __future__ import annotations

from functools import partial

import torch
from tensordict import TensorDict

from rlhf_npu.algorithms.aggregation import BatchTotals, Ranks, TokenLoss, aggregate, masked_sum
from rlhf_npu.algorithms.covariance import TOKEN_CHOICES
from rlhf_npu.algorithms.kl import KL_ESTIMATORS
from rlhf_npu.algorithms.online_dpo import Pairs, online_dpo
from rlhf_npu.algorithms.policy_losses import POLICY_LOSSES, PolicyInputs
from rlhf_npu.algorithms.token_probs import entropy_from_logits, log_probs_from_logits
from rlhf_npu.config import ActorConfig
from rlhf_npu.config.policy_loss import OF_PAIRS
from rlhf_npu.engines.collectives import all_reduce, gather
from rlhf_npu.engines.trainer_engine import MicroLoss, Sums, TrainerEngine, infer
from rlhf_npu.roles.mini_batches import mean_over_steps, train_epochs
from rlhf_npu.roles.rollout_batch import model_inputs, trim


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
    """The actor: a causal language model trained with the policy loss that `actor.policy_loss` names."""

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
        self.choose_tokens(batch, mini_batch_size)
        steps = train_epochs(self.engine, batch, self._loss, self._config, mini_batch_size, self._horizon)
        return mean_over_steps(steps, "actor") | {"actor/ppo_kl_first": steps[0]["ppo_kl"]}

    def choose_tokens(self, batch: TensorDict, mini_batch_size: int) -> None:
        """Set `chosen` (B, R) for losses that treat tokens apart; all ranks call this together."""
        choose = TOKEN_CHOICES.get(self._config.policy_loss.loss_mode)
        if choose is None:
            return
        ranks = Ranks(all_reduce, gather)
        mini_batches = batch.split(mini_batch_size)
        batch["chosen"] = torch.cat(
            [choose(policy_inputs(part["old_log_probs"], part), self._config, ranks) for part in mini_batches]
        )

    def _loss(self, model: torch.nn.Module, batch: TensorDict, totals: BatchTotals) -> MicroLoss:
        config = self._config
        micro_batch = trim(batch)
        mask = micro_batch["loss_mask"]
        logits = response_logits(model, micro_batch)
        log_probs = log_probs_from_logits(logits, micro_batch["responses"], self._temperature)
        of_pairs = config.policy_loss.loss_mode in OF_PAIRS
        shares_of = partial(pair_shares, beta=config.policy_loss.dpo_beta) if of_pairs else self._token_shares
        sums = shares_of(log_probs, micro_batch, totals)
        loss = sums["pg_loss"]
        with torch.set_grad_enabled(config.entropy_coeff != 0):
            entropy = entropy_from_logits(logits, self._temperature)
            sums["entropy"] = masked_sum(entropy, mask) / totals.tokens
        if config.entropy_coeff:
            loss = loss - config.entropy_coeff * aggregate(entropy, mask, config.loss_agg_mode, totals)
        if config.use_kl_loss:
            kl = KL_ESTIMATORS[config.kl_loss_type](log_probs, micro_batch["ref_log_probs"])
            sums["kl_loss"] = aggregate(kl, mask, config.loss_agg_mode, totals)
            loss = loss + config.kl_loss_coef * sums["kl_loss"]
        return MicroLoss(loss, sums)

    def _token_shares(self, log_probs: torch.Tensor, micro_batch: TensorDict, totals: BatchTotals) -> Sums:
        """`pg_loss` and the metrics of a loss of tokens."""
        mask = micro_batch["loss_mask"]
        policy = self._policy_loss(log_probs, micro_batch)
        metrics = {name: masked_sum(value, mask) / totals.tokens for name, value in policy.metrics.items()}
        return {"pg_loss": aggregate(policy.loss, mask, self._config.loss_agg_mode, totals), **metrics}

    def _policy_loss(self, log_probs: torch.Tensor, micro_batch: TensorDict) -> TokenLoss:
        """The loss of each token, weighed where the rollout is corrected for."""
        inputs = policy_inputs(log_probs, micro_batch)
        policy = POLICY_LOSSES[self._config.policy_loss.loss_mode](inputs, self._config)
        if "rollout_is_weights" not in micro_batch:
            return policy
        return TokenLoss(policy.loss * micro_batch["rollout_is_weights"], policy.metrics)


def pair_shares(log_probs: torch.Tensor, micro_batch: TensorDict, totals: BatchTotals, beta: float) -> Sums:
    """`pg_loss` and the metrics of online DPO, means over the mini-batch's pairs, whose responses are side by side.

    Pairs with a response that is not trained on add nothing, nor do those of which none is better.
    """
    mask, loss_mask = micro_batch["response_mask"], micro_batch["loss_mask"]

    def of_pairs(values: torch.Tensor) -> torch.Tensor:
        return values.masked_fill(mask == 0, 0).sum(1).view(-1, 2)

    rewards = of_pairs(micro_batch["token_level_rewards"])
    result = online_dpo(Pairs(of_pairs(log_probs), of_pairs(micro_batch["ref_log_probs"]), rewards), beta)
    share = (loss_mask != 0).any(1).view(-1, 2).all(1) / (totals.sequences / 2)
    shares = {
        "pg_loss": result.loss,
        "dpo_pairs": result.told,
        "dpo_margin": result.margin,
        "dpo_accuracy": result.told * (result.margin > 0),
    }
    kl = masked_sum(micro_batch["old_log_probs"] - log_probs.detach(), loss_mask) / totals.tokens
    return {name: (value * share).sum() for name, value in shares.items()} | {"ppo_kl": kl}


def policy_inputs(log_probs: torch.Tensor, batch: TensorDict) -> PolicyInputs:
    """What a policy loss takes: `log_probs` (B, R), and the rest from a batch of the same R."""
    return PolicyInputs(
        log_prob=log_probs,
        old_log_prob=batch["old_log_probs"],
        advantages=batch["advantages"],
        mask=batch["loss_mask"],
        chosen=batch.get("chosen"),
    )
