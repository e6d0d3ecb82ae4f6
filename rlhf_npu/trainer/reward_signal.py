"""Warns of rewards that say nothing."""

from __future__ import annotations

from pathlib import Path

from rlhf_npu.trainer.metrics import UNGRADABLE, ZERO_STD, Metrics

PATIENCE = 5


class RewardSignal:
    """Warns once where rewards have told the policy nothing for `patience` steps in a row.

    Args:
        group_relative: advantages compare the responses to one prompt, so groups of equal rewards teach nothing.
        rollouts: the folder of responses and scores, for the warning to name.
    """

    def __init__(self, group_relative: bool, rollouts: Path, patience: int = PATIENCE) -> None:
        self._group_relative = group_relative
        self._rollouts = rollouts
        self._patience = patience
        self._steps = 0
        self._warned = False

    def observe(self, metrics: Metrics, step: int) -> list[str]:  # noqa: ARG002
        """The warning, after the step that exhausts the patience; a step without rewards does not count."""
        if "critic/score/max" not in metrics or self._warned:
            return []
        what = self._without_signal(metrics)
        self._steps = self._steps + 1 if what else 0
        if self._steps < self._patience:
            return []
        self._warned = True
        return [f"for {self._steps} steps {what}: rewards teach the policy nothing. {self._advice(metrics)}"]

    def _without_signal(self, metrics: Metrics) -> str:
        lowest, highest = metrics["critic/score/min"], metrics["critic/score/max"]
        if lowest == highest:
            return f"all rewards have been equal (now {highest:g})"
        if self._group_relative and metrics.get(ZERO_STD) == 1:
            return "all responses to the same prompt have got the same reward"
        return ""

    def _advice(self, metrics: Metrics) -> str:
        solved = "the task may be solved; " if metrics["critic/score/min"] >= 1 else ""
        return (
            f"Look at responses and scores in {self._rollouts}: {solved}does reward.function find the answer in the "
            "form in which the model gives it, does data.max_response_length cut answers off, are prompts too hard or "
            "too easy, are responses alike because actor_rollout_ref.rollout.temperature is low?"
        )


class Ungradable:
    """Warns once where a response could not be graded, since its record has no ground truth that can be read."""

    def __init__(self, rollouts: Path) -> None:
        self._rollouts = rollouts
        self._warned = False

    def observe(self, metrics: Metrics, step: int) -> list[str]:  # noqa: ARG002
        """The warning, after the first such response."""
        if self._warned or not metrics.get(UNGRADABLE):
            return []
        self._warned = True
        return [f"{metrics[UNGRADABLE]:.1%} of the responses could not be graded and got 0. {self._advice()}"]

    def _advice(self) -> str:
        return f"The reasons are under 'ungradable' in {self._rollouts}; {UNGRADABLE} tells how many in each step"
