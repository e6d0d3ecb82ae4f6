"""The root of the configuration of `rlhf_npu.main_ppo`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from rlhf_npu.config.actor_rollout_ref import ActorRolloutRefConfig
from rlhf_npu.config.algorithm import OF_GROUPS, AlgorithmConfig
from rlhf_npu.config.batch_math import KEYS_OF_A_BATCH, BatchMath
from rlhf_npu.config.critic import CriticConfig
from rlhf_npu.config.data import DataConfig
from rlhf_npu.config.hybrid import HybridConfig
from rlhf_npu.config.keys import Problem
from rlhf_npu.config.policy_loss import OF_PAIRS, OF_SEQUENCES
from rlhf_npu.config.reward import KINDS, RewardConfig
from rlhf_npu.config.reward_model import ScoringConfig
from rlhf_npu.config.root import RootConfig, problem_list
from rlhf_npu.config.trainer import PPOTrainerConfig
from rlhf_npu.errors import ConfigError


@dataclass
class PPOConfig(RootConfig):
    """A run: PPO with a critic, or GRPO without."""

    data: DataConfig = field(default_factory=DataConfig)
    actor_rollout_ref: ActorRolloutRefConfig = field(default_factory=ActorRolloutRefConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    reward_model: ScoringConfig = field(default_factory=ScoringConfig)
    hybrid: HybridConfig = field(default_factory=HybridConfig)
    trainer: PPOTrainerConfig = field(default_factory=PPOTrainerConfig)

    @property
    def has_critic(self) -> bool:
        """Whether a value model is built."""
        return self.algorithm.adv_estimator == "gae"

    @property
    def has_reference(self) -> bool:
        """Whether a frozen copy of the policy is built."""
        actor = self.actor_rollout_ref.actor
        return actor.use_kl_loss or actor.policy_loss.loss_mode in OF_PAIRS or self.algorithm.use_kl_in_reward

    @property
    def batch_math(self) -> BatchMath:
        """The arithmetic of one step."""
        policy, critic = self.actor_rollout_ref, self.critic
        return BatchMath(
            prompts=self.data.train_batch_size,
            responses_per_prompt=policy.rollout.n,
            mini_batch_prompts=policy.actor.ppo_mini_batch_size,
            nodes=self.trainer.nnodes,
            devices_per_node=self.trainer.n_devices_per_node,
            tensor_parallel=policy.rollout.tensor_model_parallel_size,
            actor_micro_batch=policy.actor.ppo_micro_batch_size_per_device,
            old_log_prob_micro_batch=policy.rollout.log_prob_micro_batch_size_per_device,
            critic_micro_batch=critic.ppo_micro_batch_size_per_device if self.has_critic else None,
            ref_log_prob_micro_batch=policy.ref.log_prob_micro_batch_size_per_device if self.has_reference else None,
            reward_micro_batch=self.reward_model.micro_batch_size_per_device if self.reward_model.enable else None,
            actor_epochs=policy.actor.ppo_epochs,
            critic_epochs=critic.ppo_epochs,
        )

    def check(self) -> None:
        """Checks every key and the batch arithmetic, then freezes the configuration.

        Raises:
            ConfigError: names all problems at once; wrong arithmetic comes with its table.
        """
        found = self.problems()
        arithmetic = self._batch_problems({problem.key for problem in found})
        if found or arithmetic:
            table = ["", self.batch_math.text()] if arithmetic else []
            raise ConfigError("\n".join([problem_list([*found, *arithmetic]), *table]))
        self.freeze()

    def relations(self) -> Iterator[Problem]:
        yield from self._estimator_problems()
        if not self.reward.names and not self.reward_model.enable:
            right = f"must be {KINDS}; or name several in reward.functions, or a model in reward_model.model.path"
            yield Problem("reward.function", None, right)
        buffer, longest = self.reward.overlong_buffer.len, self.data.max_response_length
        if buffer > longest:
            yield Problem("reward.overlong_buffer.len", buffer, f"must be at most data.max_response_length={longest}")
        for name, stage in self._zero_stages().items():
            if stage == 0 and self.actor_rollout_ref.model.dtype == "bfloat16":
                right = "in bfloat16 DeepSpeed's stage 0 does not take the steps that fp32 or stages 1 to 3 take; set 1"
                yield Problem(name, stage, right)

    def _estimator_problems(self) -> Iterator[Problem]:
        estimator = self.algorithm.adv_estimator
        if estimator in OF_GROUPS and self.actor_rollout_ref.rollout.n == 1:
            right = f"algorithm.adv_estimator={estimator} compares a prompt's responses, so it needs at least 2"
            yield Problem("actor_rollout_ref.rollout.n", 1, right)
        if self.algorithm.filter_groups.enable:
            yield from self._filter_problems()
        if self.actor_rollout_ref.actor.policy_loss.loss_mode in OF_PAIRS:
            yield from self._pair_problems()
        if self.trainer.critic_warmup and not self.has_critic:
            right = f"there is no critic to warm up with algorithm.adv_estimator={estimator}; set 0"
            yield Problem("trainer.critic_warmup", self.trainer.critic_warmup, right)

    def _filter_problems(self) -> Iterator[Problem]:
        key = "algorithm.filter_groups.enable"
        if self.actor_rollout_ref.rollout.n == 1:
            yield Problem(key, True, "compares a prompt's responses, so actor_rollout_ref.rollout.n must be at least 2")
        if self.algorithm.adv_estimator == "remax":
            yield Problem(key, True, "remax compares with a greedy response, whatever the others are; set false")

    def _pair_problems(self) -> Iterator[Problem]:
        policy, correction = self.actor_rollout_ref, self.algorithm.rollout_correction
        mode, micro = policy.actor.policy_loss.loss_mode, policy.actor.ppo_micro_batch_size_per_device
        if policy.rollout.n != 2:
            right = f"policy_loss.loss_mode={mode} compares the two responses to a prompt; set 2"
            yield Problem("actor_rollout_ref.rollout.n", policy.rollout.n, right)
        if micro % 2:
            right = (
                f"policy_loss.loss_mode={mode} needs both responses to a prompt in a micro-batch; set an even number"
            )
            yield Problem("actor_rollout_ref.actor.ppo_micro_batch_size_per_device", micro, right)
        if self.has_critic:
            right = f"policy_loss.loss_mode={mode} has no use for a critic; set grpo"
            yield Problem("algorithm.adv_estimator", self.algorithm.adv_estimator, right)
        for name, value in (("rollout_is", correction.rollout_is), ("rollout_rs", correction.rollout_rs)):
            if value is not None:
                right = f"policy_loss.loss_mode={mode} has no tokens to weigh; set null"
                yield Problem(f"algorithm.rollout_correction.{name}", value, right)

    def warnings(self) -> list[str]:
        """What can run and is probably not meant."""
        actor = self.actor_rollout_ref.actor
        mode, aggregation = actor.policy_loss.loss_mode, actor.loss_agg_mode
        found = []
        if mode in OF_SEQUENCES and aggregation != "seq-mean-token-mean":
            found.append(
                f"actor_rollout_ref.actor.loss_agg_mode={aggregation}: the paper of loss_mode={mode} counts each "
                f"response once, which is seq-mean-token-mean; algorithm={mode} sets both"
            )
        if mode == "gpg" and self._updates_a_step > 1:
            found.append(
                "actor_rollout_ref.actor.policy_loss.loss_mode=gpg knows no ratio to the policy that sampled, and "
                f"{self._updates_a_step} optimizer steps are taken on each batch"
            )
        return found

    @property
    def _updates_a_step(self) -> int:
        actor = self.actor_rollout_ref.actor
        return actor.ppo_epochs * self.data.train_batch_size // actor.ppo_mini_batch_size

    def _zero_stages(self) -> dict[str, int]:
        stages = {"actor_rollout_ref.actor.zero_stage": self.actor_rollout_ref.actor.zero_stage}
        return stages | ({"critic.zero_stage": self.critic.zero_stage} if self.has_critic else {})

    def _batch_problems(self, wrong_keys: set[str]) -> list[Problem]:
        return [] if wrong_keys & KEYS_OF_A_BATCH else self.batch_math.problems()
