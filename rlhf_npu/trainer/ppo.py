"""The loop of PPO and GRPO, as the driver sees it: each line is a step of the algorithm."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from rlhf_npu.algorithms.kl import kl_controller
from rlhf_npu.config import PPOConfig
from rlhf_npu.data.loader import PromptLoader
from rlhf_npu.data.prompts import PromptSample
from rlhf_npu.trainer.function_check import FunctionCheck
from rlhf_npu.trainer.metrics import (
    Metrics,
    StepClock,
    reward_metrics,
    sample_metrics,
    switch_metrics,
    throughput_metrics,
    validation_metrics,
)
from rlhf_npu.trainer.output import OutputFolder
from rlhf_npu.trainer.trackers import Trackers
from rlhf_npu.workers.worker_group import WorkerGroup


class PPOTrainer:
    """Trains a policy on prompts: PPO with a critic, or GRPO without."""

    def __init__(
        self,
        config: PPOConfig,
        workers: WorkerGroup,
        prompts: PromptLoader,
        held_out: list[PromptSample],
        check: FunctionCheck,
        trackers: Trackers,
        output: OutputFolder,
        total_steps: int,
    ) -> None:
        self._config = config
        self._workers = workers
        self._prompts = prompts
        self._held_out = held_out
        self._check = check
        self._trackers = trackers
        self._output = output
        self._total_steps = total_steps
        self._kl_controller = kl_controller(config.algorithm.kl_ctrl)

    def fit(self) -> None:
        """Train for `total_steps`, validating and saving as configured, and save the final model."""
        if self._config.trainer.val_before_train:
            self._trackers.log(self._validate(step=0), step=0)
        for step, prompts in self._batches():
            metrics = self._train_step(prompts, step)
            if step == self._config.trainer.critic_warmup + 1:
                self._check.after_training(step)
            if self._is_due(self._config.trainer.test_freq, step):
                metrics |= self._validate(step)
            if self._is_due(self._config.trainer.save_freq, step):
                metrics |= self._save(step)
            self._trackers.log(metrics, step)

    def _train_step(self, prompts: list[PromptSample], step: int) -> Metrics:
        workers, clock, metrics = self._workers, StepClock(), Metrics()
        with clock("step"):
            with clock("gen"):
                workers.call_with_prompts("generate", prompts, step)
            metrics |= switch_metrics(workers.call("to_train"))
            with clock("reward"):
                samples = workers.call("reward", step)
            with clock("old_log_prob"):
                metrics |= workers.call("old_log_prob")[0]
            if self._config.has_reference:
                with clock("ref"):
                    workers.call("ref")
            if self._config.has_critic:
                with clock("values"):
                    workers.call("values")
            with clock("adv"):
                metrics |= workers.call("adv", self._kl_controller.value)[0]
            if self._config.has_critic:
                with clock("update_critic"):
                    metrics |= workers.call("update_critic")[0]
            if step > self._config.trainer.critic_warmup:
                with clock("update_actor"):
                    metrics |= workers.call("update_actor")[0]
            metrics |= switch_metrics(workers.call("to_generate"))
        if self._config.algorithm.use_kl_in_reward:
            sequences = len(prompts) * self._config.actor_rollout_ref.rollout.n
            self._kl_controller.update(metrics["actor/reward_kl_penalty"], sequences)
        metrics |= clock.metrics() | sample_metrics(samples, self._config.data)
        metrics |= reward_metrics(samples, self._config.actor_rollout_ref.rollout.n)
        return metrics | throughput_metrics(metrics, self._workers.call("memory"))

    def _validate(self, step: int) -> Metrics:
        if not self._held_out:
            return Metrics()
        clock = StepClock()
        with clock("testing"):
            samples = self._workers.call_with_prompts("validate", self._held_out, step)
        n = self._config.actor_rollout_ref.rollout.val_kwargs.n
        return validation_metrics(samples, n) | clock.metrics()

    def _save(self, step: int) -> Metrics:
        clock = StepClock()
        with clock("save_checkpoint"):
            self._workers.call("save", str(self._output.model_folder(step, final=step == self._total_steps)))
        return clock.metrics()

    def _batches(self) -> Iterator[tuple[int, list[PromptSample]]]:
        batches = itertools.chain.from_iterable(self._prompts.batches(epoch) for epoch in itertools.count())
        return zip(range(1, self._total_steps + 1), batches, strict=False)

    def _is_due(self, frequency: int, step: int) -> bool:
        return step == self._total_steps or (frequency > 0 and step % frequency == 0)
