"""Rewards that say nothing are said so, once."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import pytest
from rich.console import Console

from rlhf_npu.config import compose_config
from rlhf_npu.errors import RewardError
from rlhf_npu.roles.group_filter import GroupCounts
from rlhf_npu.roles.scoring import failures_allowed
from rlhf_npu.trainer.metrics import Metrics, filter_metrics, reward_metrics, validation_metrics
from rlhf_npu.trainer.reward_signal import Failed, Filled, RewardSignal, Ungradable, check_failures
from rlhf_npu.trainer.terminal import PPO_LINE, Terminal
from rlhf_npu.trainer.watch import Watch
from rlhf_npu.workers.hybrid_worker import FilteredSamples, Samples


def samples(
    scores: list[float],
    ungradable: int = 0,
    failures: list[str | None] | None = None,
    parts: list[dict[str, float]] | None = None,
) -> Samples:
    count = len(scores)
    bad = [place < ungradable for place in range(count)]
    return Samples(
        ["a"] * count,
        scores,
        [1] * count,
        [1] * count,
        [True] * count,
        bad,
        failures or [None] * count,
        parts or [{} for _ in scores],
    )


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


def test_parts_are_averaged_over_the_responses_that_have_them() -> None:
    ranks = [samples([0, 1], parts=[{"acc": 1.0}, {"acc": 0.0, "length": 7.0}]), samples([0], parts=[{"acc": 1.0}])]
    metrics = reward_metrics(ranks, n=1)
    assert metrics["reward/acc/mean"] == pytest.approx(2 / 3)
    assert metrics["reward/length/mean"] == 7.0
    validation = validation_metrics(ranks, n=1)
    assert validation["val-aux/a/acc/mean@1"] == pytest.approx(2 / 3)
    assert validation["val-core/a/reward/mean@1"] == pytest.approx(1 / 3)


def test_failures_are_counted_over_all_ranks_and_too_many_end_the_run() -> None:
    ranks = [samples([0, 1], failures=["it raised", None]), samples([0, 0])]
    assert reward_metrics(ranks, n=2)["reward/failed"] == 0.25
    check_failures(ranks, 0.25)
    with pytest.raises(
        RewardError, match=r"max_failed_ratio=0\.2 allows 0 of 4 responses to fail, and 1 have; the first"
    ):
        check_failures(ranks, 0.2)


@pytest.mark.parametrize(("ratio", "responses", "allowed"), [(0.29, 100, 29), (0.01, 99, 0), (0.01, 100, 1), (1, 7, 7)])
def test_a_share_of_responses_is_rounded_down_as_people_count(ratio: float, responses: int, allowed: int) -> None:
    assert failures_allowed(ratio, responses) == allowed


def test_what_was_filtered_is_counted_beside_what_was_kept() -> None:
    halves = ["actor.ppo_micro", "rollout.log_prob_micro", "ref.log_prob_micro"]
    sizes = [f"actor_rollout_ref.{name}_batch_size_per_device=64" for name in halves]
    config = compose_config(["algorithm=dapo", "actor_rollout_ref.rollout.n=2", *sizes])
    kept, generated = samples([0, 1]), samples([0, 1, 1, 1, 0, 0])
    ranks = [
        FilteredSamples(kept, generated, GroupCounts(1, 0, 2, 0)),
        FilteredSamples(kept, kept, GroupCounts(1, 0, 0, 0)),
    ]
    metrics = filter_metrics(ranks, 3, config)
    assert [metrics[f"filter_groups/{name}"] for name in ("rounds", "kept", "filled", "thrown_no_signal")] == [
        3,
        2,
        0,
        2,
    ]
    assert metrics["critic/score/all/mean"] == 0.5
    assert metrics["critic/all/frac_reward_zero_std"] == 0.5
    assert metrics["perf/all/total_num_tokens"] == 16
    assert "response_length/all/mean" in metrics
    assert not [name for name in metrics if not name.startswith("filter_groups/") and "/all/" not in name]


def test_failures_among_what_was_thrown_away_are_said_as_well() -> None:
    kept, thrown = (
        {"reward/failed": 0.0, "reward/ungradable": 0.0},
        {"reward/all/failed": 0.1, "reward/all/ungradable": 0.2},
    )
    (failed,) = Failed(Path("out")).observe(kept | thrown, 1)
    assert failed.startswith("the reward failed on 10.00% of the responses")
    (ungradable,) = Ungradable(Path("out")).observe(kept | thrown, 1)
    assert ungradable.startswith("20.0% of the responses could not be graded")
    assert Failed(Path("out")).observe(kept, 1) == []


def test_a_batch_that_was_filled_up_is_said_once() -> None:
    watcher = Filled()
    metrics = {"filter_groups/filled": 3.0, "filter_groups/rounds": 10.0}
    assert watcher.observe({"filter_groups/filled": 0.0, "filter_groups/rounds": 10.0}, 1) == []
    (text,) = watcher.observe(metrics, 2)
    assert text.startswith("algorithm.filter_groups.max_num_gen_batches=10 batches were generated, and 3 prompts whose")
    assert watcher.observe(metrics, 3) == []


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
    terminal = Terminal(5, PPO_LINE, Console(file=screen, width=80))
    folder = Path("out/[rollouts]")
    watch = Watch(terminal, [RewardSignal(True, folder, patience=2), Ungradable(folder), Failed(folder)])
    for number in range(1, 6):
        watch.log(
            step(0, 0) | {"reward/ungradable": 0.25 * (number > 2), "reward/failed": 0.005 * (number > 3)}, number
        )
    watch.close()
    first, second, third = screen.getvalue().splitlines()
    assert first.startswith("warning: step 2: for 2 steps all rewards have been equal (now 0)")
    assert "in out/[rollouts]:" in first
    assert second.startswith("warning: step 3: 25.0% of the responses could not be graded and got 0. ")
    assert third.startswith("warning: step 4: the reward failed on 0.50% of the responses, which got reward.failed_sco")


def test_names_of_data_sources_are_no_markup() -> None:
    screen = io.StringIO()
    terminal = Terminal(5, PPO_LINE, Console(file=screen, width=80))
    metrics = {"val-core/a[/bold]b/reward/mean@1": 0.5, "timing_s/step": 1.0}
    terminal.log(metrics, 1)
    terminal.summary([(1, metrics)], "out/[/red]", 1.0)
    assert "val-core/a[/bold]b/reward/mean@1 0.500" in screen.getvalue()
    assert "results in out/[/red]" in screen.getvalue()
