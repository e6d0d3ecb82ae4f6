"""Warns of rewards that say nothing, and ends a run whose rewards fail."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlhf_npu.errors import RewardError
from rlhf_npu.roles.scoring import failures_allowed
from rlhf_npu.trainer.metrics import FAILED, UNGRADABLE, ZERO_STD, Metrics, of_all
from rlhf_npu.workers.hybrid_worker import Samples

PATIENCE = 5


def check_failures(samples: Sequence[Samples], max_failed_ratio: float) -> None:
    """End the run where more responses of all ranks than may could not be scored.

    Raises:
        RewardError: says how many, and why the first.
    """
    failures = [failure for shard in samples for failure in shard.failures]
    reasons = [failure for failure in failures if failure is not None]
    allowed = failures_allowed(max_failed_ratio, len(failures))
    if len(reasons) > allowed:
        raise RewardError(
            f"reward.max_failed_ratio={max_failed_ratio:g} allows {allowed} of {len(failures)} responses to fail, and "
            f"{len(reasons)} have; the first: {reasons[0]}"
        )


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
        share = _share_of_all(metrics, UNGRADABLE)
        if self._warned or not share:
            return []
        self._warned = True
        return [f"{share:.1%} of the responses could not be graded and got 0. {self._advice()}"]

    def _advice(self) -> str:
        return f"The reasons are under 'ungradable' in {self._rollouts}; {UNGRADABLE} tells how many in each step"


class Failed:
    """Warns once where a reward function failed to score a response."""

    def __init__(self, rollouts: Path) -> None:
        self._rollouts = rollouts
        self._warned = False

    def observe(self, metrics: Metrics, step: int) -> list[str]:  # noqa: ARG002
        """The warning, after the first such response."""
        share = _share_of_all(metrics, FAILED)
        if self._warned or not share:
            return []
        self._warned = True
        what = f"the reward failed on {share:.2%} of the responses, which got reward.failed_score"
        reasons = f"The reasons are under 'failed' in {self._rollouts}"
        return [f"{what}. {reasons}; {FAILED} tells how many in each step, and reward.max_failed_ratio how many may"]


def _share_of_all(metrics: Metrics, name: str) -> float:
    """Of all responses that were generated, where groups are filtered."""
    return metrics.get(of_all(name), metrics.get(name, 0.0))


class Filled:
    """Warns once where too few prompts had responses that differ, so that others filled the batch."""

    def __init__(self) -> None:
        self._warned = False

    def observe(self, metrics: Metrics, step: int) -> list[str]:  # noqa: ARG002
        """The warning, after the first such step."""
        filled = metrics.get("filter_groups/filled")
        if self._warned or not filled:
            return []
        self._warned = True
        most = f"algorithm.filter_groups.max_num_gen_batches={metrics['filter_groups/rounds']:.0f}"
        what = f"{filled:.0f} prompts whose responses are all worth the same filled the batch"
        advice = "filter_groups/filled tells how many in each step. Are prompts too hard or too easy?"
        return [f"{most} batches were generated, and {what}; {advice}"]
