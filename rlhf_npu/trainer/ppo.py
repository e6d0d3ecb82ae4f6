"""The loop of PPO and GRPO, as the driver sees it: each line is a step of the algorithm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rlhf_npu.algorithms.kl import kl_controller
from rlhf_npu.config import PPOConfig
from rlhf_npu.data.loader import PromptLoader
from rlhf_npu.data.prompts import PromptSample
from rlhf_npu.hybrid.measured_plan import SecondPlan
from rlhf_npu.hybrid.switch_plan import Stage
from rlhf_npu.trainer.function_check import FunctionCheck
from rlhf_npu.trainer.metrics import (
    Metrics,
    StepClock,
    filter_metrics,
    rollout_metrics,
    throughput_metrics,
    validation_metrics,
)
from rlhf_npu.trainer.output import OutputFolder
from rlhf_npu.trainer.plan_watch import PlanWatch
from rlhf_npu.trainer.reward_signal import check_failures
from rlhf_npu.trainer.switch_record import SwitchRecord
from rlhf_npu.trainer.switch_times import StepSwitches
from rlhf_npu.trainer.trackers import Trackers
from rlhf_npu.workers.hybrid_worker import FilteredSamples, Samples
from rlhf_npu.workers.worker_group import WorkerGroup


class PPOTrainer:
    """Trains a policy on prompts: PPO with a critic, or GRPO without."""

    def __init__(
        self,
        config: PPOConfig,
        workers: WorkerGroup,
        plans: PlanWatch,
        prompts: PromptLoader,
        held_out: Sequence[PromptSample],
        check: FunctionCheck,
        trackers: Trackers,
        switches: SwitchRecord,
        output: OutputFolder,
        total_steps: int,
    ) -> None:
        self._config = config
        self._workers = workers
        self._plans = plans
        self._stream = prompts.stream()
        self._held_out = held_out
        self._check = check
        self._trackers = trackers
        self._switches = switches
        self._output = output
        self._total_steps = total_steps
        self._kl_controller = kl_controller(config.algorithm.kl_ctrl)

    def fit(self) -> None:
        """Train for `total_steps`, validating and saving as configured, and save the final model."""
        if self._config.trainer.val_before_train:
            self._trackers.log(self._validate(step=0), step=0)
        for step, prompts in self._batches():
            metrics = self._train_step(prompts, step)
            if step == 1:
                self._plan_again()
            if step == self._config.trainer.critic_warmup + 1:
                self._check.after_training(step)
            if self._is_due(self._config.trainer.test_freq, step):
                metrics |= self._validate(step)
            if self._is_due(self._config.trainer.save_freq, step):
                metrics |= self._save(step)
            self._trackers.log(metrics, step)

    def _plan_again(self) -> None:
        """Let the first step, which began with what was predicted, decide what must sleep in those that follow."""
        second: SecondPlan = self._workers.call("plan_again")[0]
        self._plans.observe(second)

    def _train_step(self, prompts: list[PromptSample], step: int) -> Metrics:
        workers, clock, metrics = self._workers, StepClock(), Metrics()
        with clock("step"), self._switches.step(step) as switches:
            switches.add(workers.call("enter", Stage.GENERATE))
            metrics |= self._roll_out(prompts, step, clock, switches)
            switches.add(workers.call("enter", Stage.LOG_PROB))
            with clock("old_log_prob"):
                metrics |= workers.call("old_log_prob")[0]
            if self._config.has_reference:
                switches.add(workers.call("enter", Stage.REF))
                with clock("ref"):
                    workers.call("ref")
            if self._config.has_critic:
                switches.add(workers.call("enter", Stage.VALUES))
                with clock("values"):
                    workers.call("values")
            with clock("adv"):
                metrics |= workers.call("adv", self._kl_controller.value)[0]
            if self._config.has_critic:
                switches.add(workers.call("enter", Stage.TRAIN_CRITIC))
                with clock("update_critic"):
                    metrics |= workers.call("update_critic")[0]
            if step > self._config.trainer.critic_warmup:
                switches.add(workers.call("enter", Stage.TRAIN_ACTOR))
                with clock("update_actor"):
                    metrics |= workers.call("update_actor")[0]
            switches.add(workers.call("enter", Stage.GENERATE))
        if self._config.algorithm.use_kl_in_reward:
            sequences = len(prompts) * self._config.actor_rollout_ref.rollout.n
            self._kl_controller.update(metrics["actor/reward_kl_penalty"], sequences)
        metrics |= switches.metrics() | clock.metrics()
        return metrics | throughput_metrics(metrics, workers.world_size)

    def _roll_out(self, prompts: list[PromptSample], step: int, clock: StepClock, switches: StepSwitches) -> Metrics:
        """Make the step's batch of scored responses; those of further prompts if groups are filtered."""
        config = self._config.algorithm.filter_groups
        if not config.enable:
            return rollout_metrics(self._generate_and_score(prompts, step, clock, switches), self._config)
        rounds = 1
        self._generate_and_score(prompts, step, clock, switches, rounds)
        while rounds < config.max_num_gen_batches and any(self._workers.call("missing_groups")):
            rounds += 1
            switches.add(self._workers.call("enter", Stage.GENERATE))
            self._generate_and_score(next(self._stream), step, clock, switches, rounds)
        ranks: list[FilteredSamples] = self._workers.call("take_groups")
        kept = rollout_metrics([rank.kept for rank in ranks], self._config)
        return kept | filter_metrics(ranks, rounds, self._config)

    def _generate_and_score(
        self,
        prompts: list[PromptSample],
        step: int,
        clock: StepClock,
        switches: StepSwitches,
        generation_round: int = 1,
    ) -> list[Samples]:
        with clock("gen"):
            self._workers.call_with_prompts("generate", prompts, step, generation_round)
        if self._config.reward_model.enable:
            switches.add(self._workers.call("enter", Stage.REWARD_MODEL))
            with clock("reward_model"):
                self._workers.call("reward_model")
        with clock("reward"):
            samples: list[Samples] = self._workers.call("reward", step, generation_round)
        check_failures(samples, self._config.reward.max_failed_ratio)
        return samples

    def _validate(self, step: int) -> Metrics:
        if not self._held_out:
            return Metrics()
        clock = StepClock()
        self._switches.add(self._workers.call("enter", Stage.GENERATE))
        with clock("testing"):
            self._workers.call_with_prompts("answer", self._held_out, step)
            if self._config.reward_model.enable:
                self._switches.add(self._workers.call("enter", Stage.REWARD_MODEL))
                self._workers.call("reward_model")
            samples = self._workers.call("validate", step)
        check_failures(samples, self._config.reward.max_failed_ratio)
        n = self._config.actor_rollout_ref.rollout.val_kwargs.n
        return validation_metrics(samples, n) | clock.metrics()

    def _save(self, step: int) -> Metrics:
        clock = StepClock()
        with clock("save_checkpoint"):
            self._switches.add(self._workers.call("enter", Stage.SAVE))
            self._workers.call("save", str(self._output.model_folder(step, final=step == self._total_steps)))
        return clock.metrics()

    def _batches(self) -> Iterator[tuple[int, list[PromptSample]]]:
        return zip(range(1, self._total_steps + 1), self._stream, strict=False)

    def _is_due(self, frequency: int, step: int) -> bool:
        return step == self._total_steps or (frequency > 0 and step % frequency == 0)
