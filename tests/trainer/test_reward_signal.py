"""Rewards that say nothing are said so, once."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import pytest
from rich.console import Console

from rlhf_npu.trainer.metrics import Metrics, reward_metrics
from rlhf_npu.trainer.reward_signal import RewardSignal, Ungradable
from rlhf_npu.trainer.terminal import Terminal
from rlhf_npu.trainer.watch import Watch
from rlhf_npu.workers.hybrid_worker import Samples


def samples(scores: list[float], ungradable: int = 0) -> Samples:
    count = len(scores)
    bad = [place < ungradable for place in range(count)]
    return Samples(["a"] * count, scores, [1] * count, [1] * count, [True] * count, bad)


def step(lowest: float, highest: float, zero_std: float = 0.0) -> Metrics:
    return {"critic/score/min": lowest, "critic/score/max": highest, "critic/frac_reward_zero_std": zero_std}


def warnings(steps: Iterable[Metrics], group_relative: bool = True, patience: int = 3) -> list[tuple[int, str]]:
    signal = RewardSignal(group_relative, Path("out/rollouts"), patience)
    return [(number, text) for number, metrics in enumerate(steps, start=1) for text in signal.observe(metrics, number)]


def test_groups_of_equal_rewards_are_counted_over_all_ranks() -> None:
    ranks = [samples([0, 0, 1, 1, 0, 1]), samples([0.5, 0.5]), samples([])]
    assert reward_metrics(ranks, n=2)["critic/frac_reward_zero_std"] == pytest.approx(3 / 4)
    assert reward_metrics([samples([0, 1, 1, 1, 1, 1])], n=3)["critic/frac_reward_zero_std"] == 0.5


def test_a_single_response_is_no_group() -> None:
    assert "critic/frac_reward_zero_std" not in reward_metrics([samples([0, 1])], n=1)


def test_responses_that_could_not_be_graded_are_counted() -> None:
    assert reward_metrics([samples([0, 0], ungradable=1), samples([1, 1])], n=2)["reward/ungradable"] == 0.25


def test_equal_rewards_step_after_step_give_one_warning() -> None:
    ((number, text),) = warnings([step(0, 0)] * 10)
    assert number == 3
    assert text.startswith("for 3 steps all rewards have been equal (now 0): rewards teach the policy nothing. ")
    for advice in ("out/rollouts", "reward.function", "data.max_response_length", "rollout.temperature"):
        assert advice in text
    assert "solved" not in text


def test_a_solved_task_is_mentioned_where_all_rewards_are_full() -> None:
    ((_, text),) = warnings([step(1, 1)] * 3)
    assert "the task may be solved" in text


def test_a_step_with_signal_starts_the_count_again() -> None:
    silent, telling = [step(0, 0)] * 2, [step(0, 1)]
    assert warnings([*silent, *telling, *silent, *telling, *silent]) == []
    assert [number for number, _ in warnings([*silent, *telling, *silent, step(0, 0)])] == [6]


def test_validation_alone_does_not_count() -> None:
    assert [number for number, _ in warnings([step(0, 0), {"val-core/a/reward/mean@1": 0.0}, *[step(0, 0)] * 2])] == [4]


def test_equal_rewards_within_groups_teach_only_those_who_compare_groups() -> None:
    steps = [step(0, 1, zero_std=1.0)] * 5
    ((_, text),) = warnings(steps, group_relative=True)
    assert "all responses to the same prompt have got the same reward" in text
    assert warnings(steps, group_relative=False) == []


def test_the_console_says_each_thing_once() -> None:
    screen = io.StringIO()
    terminal = Terminal(5, Console(file=screen, width=80))
    folder = Path("out/[rollouts]")
    watch = Watch(terminal, [RewardSignal(True, folder, patience=2), Ungradable(folder)])
    for number in range(1, 6):
        watch.log(step(0, 0) | {"reward/ungradable": 0.25 * (number > 2)}, number)
    watch.close()
    first, second = screen.getvalue().splitlines()
    assert first.startswith("warning: step 2: for 2 steps all rewards have been equal (now 0)")
    assert "in out/[rollouts]:" in first
    assert second.startswith("warning: step 3: 25.0% of the responses could not be graded and got 0. ")


def test_names_of_data_sources_are_no_markup() -> None:
    screen = io.StringIO()
    terminal = Terminal(5, Console(file=screen, width=80))
    metrics = {"val-core/a[/bold]b/reward/mean@1": 0.5, "timing_s/step": 1.0}
    terminal.log(metrics, 1)
    terminal.summary([(1, metrics)], "out/[/red]", 1.0)
    assert "val-core/a[/bold]b/reward/mean@1 0.500" in screen.getvalue()
    assert "results in out/[/red]" in screen.getvalue()
