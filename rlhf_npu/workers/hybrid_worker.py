"""One process a device: a DeepSpeed trainer and a vLLM rollout that take turns.

Rollouts stay here. The driver sees per-sample scalars and metrics, never tokens.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from tensordict import TensorDict

from rlhf_npu.config import PPOConfig
from rlhf_npu.data.prompts import PromptSample
from rlhf_npu.engines.models import save_policy
from rlhf_npu.engines.rollout import Completion
from rlhf_npu.errors import WorkerError
from rlhf_npu.hybrid.engine import SwitchReport
from rlhf_npu.hybrid.reshard import whole_weights
from rlhf_npu.hybrid.same_function import FunctionReport, agrees_with_eager_attention, compare_functions
from rlhf_npu.platform import PLATFORMS
from rlhf_npu.run_id import RUN_ID_VARIABLE
from rlhf_npu.workers.advantages import add_advantages, add_token_rewards
from rlhf_npu.workers.environment import Rank, free_port, log_to, worker_log
from rlhf_npu.workers.mismatch import mismatch_over_ranks
from rlhf_npu.workers.rollout_batch import build_batch
from rlhf_npu.workers.scoring import write_responses
from rlhf_npu.workers.shared_memory import join_run
from rlhf_npu.workers.tenants import Tenants, build_tenants

MIB = 1 << 20
COMPARED_TOKENS = 32  # of a response, when the two engines are compared


@dataclass(frozen=True)
class Samples:
    """Per-sample scalars of one rank's sequences: what the driver sees of a rollout."""

    data_sources: list[str]
    scores: list[float]
    prompt_lengths: list[int]
    response_lengths: list[int]
    finished: list[bool]
    ungradable: list[bool]


class HybridWorker:
    """The class of the Ray actors. Every rank gets each call; the order of calls is that of `trainer.ppo`."""

    def __init__(self, config: PPOConfig, rank: Rank, platform_name: str, output: str, driver_node: str) -> None:
        join_run(os.environ[RUN_ID_VARIABLE], may_be_first=ray.get_runtime_context().get_node_id() != driver_node)
        self._config = config
        self._rank = rank
        self._platform = PLATFORMS[platform_name]
        self._output = Path(output)
        self._log = worker_log(self._output, rank.rank)
        log_to(self._log)
        self._tenants: Tenants
        self._prompts: Sequence[PromptSample] = ()
        self._completions: list[list[Completion]] = []
        self._batch: TensorDict

    def call(self, method: str, *args: Any) -> Any:
        """Call `method`; what it raises is in this worker's log as well.

        Raises:
            WorkerError: it tried to end the process, as a user's function may.
        """
        try:
            return getattr(self, method)(*args)
        except (SystemExit, KeyboardInterrupt) as error:
            traceback.print_exc()
            raise WorkerError(
                f"rank {self._rank.rank}: {method} raised {error!r}, which would have ended the worker; "
                f"its log is {self._log}"
            ) from error
        except Exception:
            traceback.print_exc()
            raise

    def address(self) -> tuple[str, int]:
        """This node's address and a free port on it, for the ranks to meet at."""
        return ray.util.get_node_ip_address(), free_port()

    def start(self, address: str, port: int, optimizer_steps: tuple[int, int]) -> None:
        """Join the other ranks at `address:port` and build both engines.

        Args:
            optimizer_steps: of the actor and of the critic in the whole run, for their learning-rate schedules.
        """
        import deepspeed

        os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
        self._platform.activate()
        deepspeed.init_distributed(dist_backend=self._platform.dist_backend)
        torch.manual_seed(self._config.trainer.seed)
        self._tenants = build_tenants(self._config, self._platform, optimizer_steps)

    def compare_functions(self, prompts: list[tuple[int, ...]]) -> FunctionReport:
        """Score `prompts`, the same on every rank, and what the rollout engine makes of them, with both engines."""
        policy, rollout = self._tenants.policy.engine.module, self._tenants.rollout
        length = min(COMPARED_TOKENS, self._config.data.max_response_length)
        temperature = self._config.actor_rollout_ref.rollout.temperature
        return compare_functions(policy, rollout, prompts, temperature, length)

    def agrees_with_eager_attention(self, prompts: list[tuple[int, ...]]) -> bool:
        """Whether the trainer would score `prompts`, the same on every rank, as the rollout does if it were eager."""
        return agrees_with_eager_attention(self._tenants.policy.engine.module, self._tenants.rollout, prompts)

    def rehearse_reshard(self) -> None:
        """Reshard weights that have not changed."""
        self._tenants.resharder.rehearse()

    def generate(self, shards: list[list[PromptSample]], step: int) -> None:
        """Sample `rollout.n` responses to the prompts of this rank's replica and keep this rank's own.

        Args:
            shards: the prompts of each rank of the replica.
        """
        rollout = self._config.actor_rollout_ref.rollout
        self._generate(shards, n=rollout.n, temperature=rollout.temperature, step=step)
        batch = build_batch(self._prompts, self._completions)
        self._batch = batch.to(self._platform.device())

    def reward(self, step: int) -> Samples:
        """Score the responses and write them to `rollouts/`."""
        samples = self._score(step, "rollouts")
        self._batch["scores"] = torch.tensor(samples.scores, device=self._batch.device)
        return samples

    def validate(self, shards: list[list[PromptSample]], step: int) -> Samples:
        """Answer held-out prompts, score the answers and write them to `validation/`."""
        val = self._config.actor_rollout_ref.rollout.val_kwargs
        self._generate(shards, n=val.n, temperature=val.temperature, step=step)
        return self._score(step, "validation")

    def to_train(self) -> SwitchReport:
        """Give the device to the trainer."""
        return self._tenants.hybrid.to_train()

    def to_generate(self) -> SwitchReport:
        """Give the device, and the trained weights, to the rollout."""
        return self._tenants.hybrid.to_generate()

    def old_log_prob(self) -> dict[str, float]:
        """Set `old_log_probs`; returns how far the rollout engine's log-probabilities are from the trainer's."""
        micro_size = self._config.actor_rollout_ref.rollout.log_prob_micro_batch_size_per_device
        self._batch["old_log_probs"] = self._tenants.policy.log_probs(self._batch, micro_size)
        return mismatch_over_ranks(self._batch)

    def ref(self) -> None:
        """Set `ref_log_probs`."""
        assert self._tenants.reference is not None
        self._batch["ref_log_probs"] = self._tenants.reference.log_probs(self._batch)

    def values(self) -> None:
        """Set `values`."""
        assert self._tenants.critic is not None
        self._batch["values"] = self._tenants.critic.values(self._batch)

    def adv(self, kl_coef: float) -> dict[str, float]:
        """Set token rewards, advantages and returns."""
        algorithm = self._config.algorithm
        return add_token_rewards(self._batch, algorithm, kl_coef) | add_advantages(self._batch, algorithm)

    def update_critic(self) -> dict[str, float]:
        """Train the critic on the batch."""
        assert self._tenants.critic is not None
        return self._tenants.critic.update(self._batch, self._mini_batch_size)

    def update_actor(self) -> dict[str, float]:
        """Train the policy on the batch."""
        return self._tenants.policy.update(self._batch, self._mini_batch_size)

    def save(self, folder: str) -> None:
        """Write the policy in Hugging Face format; rank 0 writes, every rank takes part."""
        policy = self._tenants.policy.engine.module
        bucket = self._config.actor_rollout_ref.rollout.reshard_bucket_mb * MIB
        weights = whole_weights(policy, bucket, keep=self._rank.rank == 0)
        if self._rank.rank == 0:
            save_policy(policy, self._tenants.tokenizer, weights, Path(folder))

    def memory(self) -> dict[str, float]:
        """Peak memory of this process in GB."""
        return {"perf/max_memory_allocated_gb": self._platform.max_memory_bytes() / 1e9}

    def close(self) -> None:
        """Stop the engines and leave the process group."""
        self._tenants.rollout.shutdown()
        torch.distributed.destroy_process_group()

    @property
    def _mini_batch_size(self) -> int:
        """Sequences of an optimizer step on this rank."""
        policy = self._config.actor_rollout_ref
        return policy.actor.ppo_mini_batch_size * policy.rollout.n // self._rank.world_size

    def _generate(self, shards: list[list[PromptSample]], *, n: int, temperature: float, step: int) -> None:
        prompts = [prompt for shard in shards for prompt in shard]
        place = self._rank.rank % len(shards)
        first = sum(len(shard) for shard in shards[:place])
        replica = self._rank.rank // len(shards)
        seed = hash((self._config.trainer.seed, step, replica)) % (1 << 31)
        completions = self._tenants.rollout.generate(
            [prompt.prompt_ids for prompt in prompts], n=n, seed=seed, temperature=temperature
        )
        self._prompts = shards[place]
        self._completions = completions[first : first + len(self._prompts)]

    def _score(self, step: int, folder: str) -> Samples:
        responses = self._tenants.scorer.score(self._prompts, self._completions, step)
        name = f"step_{step:06d}.rank_{self._rank.rank}.jsonl"
        write_responses(responses, self._output / folder / name)
        choices = [choice for choices in self._completions for choice in choices]
        n = len(choices) // max(1, len(self._prompts))
        return Samples(
            data_sources=[response.data_source for response in responses],
            scores=[response.score for response in responses],
            prompt_lengths=[len(prompt.prompt_ids) for prompt in self._prompts for _ in range(n)],
            response_lengths=[len(choice.token_ids) for choice in choices],
            finished=[choice.finished for choice in choices],
            ungradable=[response.ungradable is not None for response in responses],
        )
