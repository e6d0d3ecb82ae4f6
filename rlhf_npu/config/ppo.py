"""The root of the configuration of `rlhf_npu.main_ppo`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rlhf_npu.config.actor_rollout_ref import ActorRolloutRefConfig
from rlhf_npu.config.algorithm import AlgorithmConfig
from rlhf_npu.config.batch_math import KEYS_OF_A_BATCH, BatchMath
from rlhf_npu.config.critic import CriticConfig
from rlhf_npu.config.data import DataConfig
from rlhf_npu.config.keys import ConfigNode, Leaf, Problem, leaves
from rlhf_npu.config.reward import RewardConfig
from rlhf_npu.config.trainer import TrainerConfig
from rlhf_npu.errors import ConfigError


@dataclass
class PPOConfig(ConfigNode):
    """A run: PPO with a critic, or GRPO without."""

    data: DataConfig = field(default_factory=DataConfig)
    actor_rollout_ref: ActorRolloutRefConfig = field(default_factory=ActorRolloutRefConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    @property
    def has_critic(self) -> bool:
        """Whether a value model is built."""
        return self.algorithm.adv_estimator == "gae"

    @property
    def has_reference(self) -> bool:
        """Whether a frozen copy of the policy is built."""
        return self.actor_rollout_ref.actor.use_kl_loss or self.algorithm.use_kl_in_reward

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
        if self.algorithm.adv_estimator == "grpo" and self.actor_rollout_ref.rollout.n == 1:
            right = "algorithm.adv_estimator=grpo compares a prompt's responses, so it needs at least 2"
            yield Problem("actor_rollout_ref.rollout.n", 1, right)
        if self.trainer.critic_warmup and not self.has_critic:
            right = "there is no critic to warm up with algorithm.adv_estimator=grpo; set 0"
            yield Problem("trainer.critic_warmup", self.trainer.critic_warmup, right)

        for name, stage in self._zero_stages().items():
            if stage == 0 and self.actor_rollout_ref.model.dtype == "bfloat16":
                right = "in bfloat16 DeepSpeed's stage 0 does not take the steps that fp32 or stages 1 to 3 take; set 1"
                yield Problem(name, stage, right)

    def _zero_stages(self) -> dict[str, int]:
        stages = {"actor_rollout_ref.actor.zero_stage": self.actor_rollout_ref.actor.zero_stage}
        return stages | ({"critic.zero_stage": self.critic.zero_stage} if self.has_critic else {})

    def _batch_problems(self, wrong_keys: set[str]) -> list[Problem]:
        return [] if wrong_keys & KEYS_OF_A_BATCH else self.batch_math.problems()


LEAVES: dict[str, Leaf] = {leaf.key: leaf for leaf in leaves(PPOConfig)}
KEYS = set(LEAVES) | {key.rsplit(".", depth)[0] for key in LEAVES for depth in range(1, key.count(".") + 1)}


def problem_list(problems: Sequence[Problem | str]) -> str:
    """One line a problem, under a line that counts them."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return "\n".join([f"the configuration has {count}:", *(f"  {problem}" for problem in problems)])
