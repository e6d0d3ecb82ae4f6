"""One process a device: a DeepSpeed trainer and a vLLM rollout that take turns.

Rollouts stay here. The driver sees per-sample scalars and metrics, never tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict

from rlhf_npu.config import PPOConfig
from rlhf_npu.data.prompts import PromptSample
from rlhf_npu.engines.models import save_policy
from rlhf_npu.engines.rollout import Completion
from rlhf_npu.hybrid.measured_plan import SecondPlan, plan_again
from rlhf_npu.hybrid.memory.memory_plan import MemoryPlan
from rlhf_npu.hybrid.resharding.gathered import whole_weights
from rlhf_npu.hybrid.same_function import (
    FunctionReport,
    RolloutScores,
    agrees_with_eager_attention,
    compare_scores,
    rollout_scores,
)
from rlhf_npu.hybrid.switch_plan import Stage, SwitchPlan
from rlhf_npu.hybrid.switch_report import SwitchReport
from rlhf_npu.rewards import Graded, numeric_parts
from rlhf_npu.roles.advantages import add_advantages, add_token_rewards
from rlhf_npu.roles.group_filter import Group, GroupCounts, GroupFilter
from rlhf_npu.roles.mismatch import correct_over_ranks, mismatch_over_ranks
from rlhf_npu.roles.rollout_batch import build_batch
from rlhf_npu.roles.scoring import write_responses
from rlhf_npu.roles.tenants import Tenants, build_tenants
from rlhf_npu.workers.worker_process import WorkerProcess

MIB = 1 << 20
COMPARED_TOKENS = 32  # of a response, when the two engines are compared


@dataclass(frozen=True)
class Samples:
    """Per-sample scalars of one rank's sequences: what the driver sees of a rollout.

    Attributes:
        failures: why a sequence has no score but `reward.failed_score`, if so.
        parts: numbers that the reward function returned beside the score.
    """

    data_sources: list[str]
    scores: list[float]
    prompt_lengths: list[int]
    response_lengths: list[int]
    finished: list[bool]
    ungradable: list[bool]
    failures: list[str | None]
    parts: list[dict[str, float]]

    @staticmethod
    def of(groups: Sequence[Group]) -> Samples:
        """The scalars of `groups`, a prompt's responses side by side."""
        lines = [line for group in groups for line in group.scored]
        choices = [choice for group in groups for choice in group.completions]
        return Samples(
            data_sources=[line.data_source for line in lines],
            scores=[line.score for line in lines],
            prompt_lengths=[len(group.prompt.prompt_ids) for group in groups for _ in group.completions],
            response_lengths=[len(choice.token_ids) for choice in choices],
            finished=[choice.finished for choice in choices],
            ungradable=[line.ungradable is not None for line in lines],
            failures=[line.failed for line in lines],
            parts=[numeric_parts(line.reward_extra_info) for line in lines],
        )


@dataclass(frozen=True)
class FilteredSamples:
    """What one rank trains on of all that it generated in a step."""

    kept: Samples
    generated: Samples
    counts: GroupCounts


class HybridWorker(WorkerProcess):
    """The class of the Ray actors; the order of calls is that of `trainer.ppo`."""

    def __init__(self, config: PPOConfig, *place: Any) -> None:
        super().__init__(*place)
        self._config = config
        self._tenants: Tenants
        self._memory: MemoryPlan
        self._prompts: Sequence[PromptSample] = ()
        self._completions: list[list[Completion]] = []
        self._greedy: list[list[Completion]] = []
        self._by_model: list[Graded] | None = None
        self._greedy_by_model: list[Graded] | None = None
        self._filter = self._group_filter() if config.algorithm.filter_groups.enable else None
        self._batch: TensorDict
        self._scores: RolloutScores

    def start(self, optimizer_steps: tuple[int, int], memory: MemoryPlan) -> SwitchPlan:
        """Build both engines; returns the first step's plan.

        Args:
            optimizer_steps: of the actor and of the critic in the whole run, for their learning-rate schedules.
            memory: as predicted.
        """
        self._memory = memory
        self._tenants = build_tenants(self._config, self._platform, optimizer_steps, memory)
        return self._tenants.hybrid.plan

    def rollout_scores(self, prompts: list[tuple[int, ...]]) -> None:
        """Let the rollout engine continue `prompts`, the same on every rank, and score the sequences."""
        self._require(Stage.GENERATE)
        length = min(COMPARED_TOKENS, self._config.data.max_response_length)
        self._scores = rollout_scores(self._tenants.rollout, prompts, length)

    def compare_functions(self) -> FunctionReport:
        """Score with the trainer what the rollout engine has scored last, and compare."""
        self._require(Stage.LOG_PROB)
        temperature = self._config.actor_rollout_ref.rollout.temperature
        return compare_scores(self._tenants.policy.engine.module, self._scores, temperature)

    def agrees_with_eager_attention(self) -> bool:
        """Whether the trainer would score that as the rollout engine does if its attention were eager."""
        self._require(Stage.LOG_PROB)
        return agrees_with_eager_attention(self._tenants.policy.engine.module, self._scores)

    def rehearse_reshard(self) -> None:
        """Reshard weights that have not changed."""
        self._tenants.hybrid.rehearse_reshard()

    def generate(self, shards: list[list[PromptSample]], step: int, generation_round: int = 1) -> None:
        """Sample `rollout.n` responses to the prompts of this rank's replica and keep this rank's own.

        Args:
            shards: the prompts of each rank of the replica.
            generation_round: from 1; each of a step has other prompts.
        """
        self._require(Stage.GENERATE)
        rollout = self._config.actor_rollout_ref.rollout
        if self._config.algorithm.adv_estimator == "remax":
            self._generate(shards, n=1, temperature=0.0, step=step)
            self._greedy = self._completions
        self._generate(shards, rollout.n, rollout.temperature, step, generation_round)

    def reward_model(self) -> None:
        """Score the responses that were generated last with the reward model; `reward` takes the scores."""
        self._require(Stage.REWARD_MODEL)
        model = self._tenants.reward_model
        assert model is not None
        self._by_model = model.grade(self._prompts, self._completions)
        if self._greedy:
            self._greedy_by_model = model.grade(self._prompts, self._greedy)

    def reward(self, step: int, generation_round: int = 1) -> Samples:
        """Score the responses and write them to `rollouts/`; they become the batch, unless groups are filtered.

        It has `scores`, and for ReMax `baselines`.
        """
        groups = self._score(step, "rollouts", generation_round)
        if self._filter is not None:
            self._filter.add(groups)
            return Samples.of(groups)
        self._build_batch(groups)
        if self._greedy:
            greedy = self._tenants.scorer.score(self._prompts, self._greedy, step, self._greedy_by_model)
            baselines = torch.tensor([response.score for response in greedy], device=self._batch.device)
            self._batch["baselines"] = baselines.repeat_interleave(self._config.actor_rollout_ref.rollout.n)
        return Samples.of(groups)

    def missing_groups(self) -> int:
        """Prompts whose responses differ that this rank still needs for its share of the batch."""
        assert self._filter is not None
        return self._filter.missing

    def take_groups(self) -> FilteredSamples:
        """Make the batch of what the filter has chosen from all rounds; each rank has as many prompts."""
        assert self._filter is not None
        kept, generated, counts = self._filter.take()
        self._build_batch(kept)
        return FilteredSamples(Samples.of(kept), Samples.of(generated), counts)

    def answer(self, shards: list[list[PromptSample]], step: int) -> None:
        """Answer held-out prompts."""
        self._require(Stage.GENERATE)
        val = self._config.actor_rollout_ref.rollout.val_kwargs
        self._greedy = []
        self._generate(shards, n=val.n, temperature=val.temperature, step=step)

    def validate(self, step: int) -> Samples:
        """Score the answers and write them to `validation/`."""
        return Samples.of(self._score(step, "validation"))

    def enter(self, stage: Stage) -> SwitchReport:
        """Make the device ready for a stage: what it needs wakes, and what must leave room for it sleeps."""
        return self._tenants.hybrid.enter(stage)

    def plan_again(self) -> SecondPlan:
        """Plan the switches from what the first step took; the result is the same on every rank."""
        return plan_again(self._tenants.hybrid, self._config, self._memory, self._platform)

    def old_log_prob(self) -> dict[str, float]:
        """Set `old_log_probs`; returns how far the rollout engine's log-probabilities are from the trainer's."""
        self._require(Stage.LOG_PROB)
        micro_size = self._config.actor_rollout_ref.rollout.log_prob_micro_batch_size_per_device
        self._batch["old_log_probs"] = self._tenants.policy.log_probs(self._batch, micro_size)
        correction = self._config.algorithm.rollout_correction
        return mismatch_over_ranks(self._batch) | correct_over_ranks(self._batch, correction)

    def ref(self) -> None:
        """Set `ref_log_probs`."""
        self._require(Stage.REF)
        assert self._tenants.reference is not None
        self._batch["ref_log_probs"] = self._tenants.reference.log_probs(self._batch)

    def values(self) -> None:
        """Set `values`."""
        self._require(Stage.VALUES)
        assert self._tenants.critic is not None
        self._batch["values"] = self._tenants.critic.values(self._batch)

    def adv(self, kl_coef: float) -> dict[str, float]:
        """Set token rewards, advantages and returns."""
        rewards = add_token_rewards(self._batch, self._config, kl_coef)
        return rewards | add_advantages(self._batch, self._config.algorithm)

    def update_critic(self) -> dict[str, float]:
        """Train the critic on the batch."""
        self._require(Stage.TRAIN_CRITIC)
        assert self._tenants.critic is not None
        return self._tenants.critic.update(self._batch, self._mini_batch_size)

    def update_actor(self) -> dict[str, float]:
        """Train the policy on the batch."""
        self._require(Stage.TRAIN_ACTOR)
        return self._tenants.policy.update(self._batch, self._mini_batch_size)

    def save(self, folder: str) -> None:
        """Write the policy in Hugging Face format; rank 0 writes, every rank takes part."""
        self._require(Stage.SAVE)
        policy = self._tenants.policy.engine.module
        bucket = self._config.actor_rollout_ref.rollout.reshard_bucket_mb * MIB
        weights = whole_weights(policy, bucket, keep=self._rank.rank == 0)
        if self._rank.rank == 0:
            save_policy(policy, self._tenants.tokenizer, weights, Path(folder))

    def close(self) -> None:
        """Stop the engines and leave the process group."""
        self._tenants.rollout.shutdown()
        super().close()

    def _require(self, stage: Stage) -> None:
        self._tenants.hybrid.require(stage)

    @property
    def _mini_batch_size(self) -> int:
        """Sequences of an optimizer step on this rank."""
        policy = self._config.actor_rollout_ref
        return policy.actor.ppo_mini_batch_size * policy.rollout.n // self._rank.world_size

    def _group_filter(self) -> GroupFilter:
        share = self._config.data.train_batch_size // self._rank.world_size
        return GroupFilter(share, self._config.algorithm.filter_groups.metric)

    def _build_batch(self, groups: Sequence[Group]) -> None:
        prompts, completions = [group.prompt for group in groups], [group.completions for group in groups]
        batch = build_batch(prompts, completions, self._config.algorithm.mask_truncated_completions)
        self._batch = batch.to(self._platform.device())
        scores = [line.score for group in groups for line in group.scored]
        self._batch["scores"] = torch.tensor(scores, device=self._batch.device)

    def _generate(
        self, shards: list[list[PromptSample]], n: int, temperature: float, step: int, generation_round: int = 1
    ) -> None:
        prompts = [prompt for shard in shards for prompt in shard]
        place = self._rank.rank % len(shards)
        first = sum(len(shard) for shard in shards[:place])
        replica = self._rank.rank // len(shards)
        later = (generation_round,) if generation_round > 1 else ()
        seed = hash((self._config.trainer.seed, step, replica, *later)) % (1 << 31)
        completions = self._tenants.rollout.generate(
            [prompt.prompt_ids for prompt in prompts], n=n, seed=seed, temperature=temperature
        )
        self._by_model = None
        self._prompts = shards[place]
        self._completions = completions[first : first + len(self._prompts)]

    def _score(self, step: int, folder: str, generation_round: int = 1) -> list[Group]:
        responses = self._tenants.scorer.score(self._prompts, self._completions, step, self._by_model)
        later = f".round_{generation_round}" if generation_round > 1 else ""
        name = f"step_{step:06d}{later}.rank_{self._rank.rank}.jsonl"
        write_responses(responses, self._output / folder / name)
        lines = iter(responses)
        return [
            Group(prompt, choices, list(itertools.islice(lines, len(choices))))
            for prompt, choices in zip(self._prompts, self._completions, strict=True)
        ]
