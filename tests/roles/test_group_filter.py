"""Which prompts DAPO's dynamic sampling trains on."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_npu.engines.rollout import Completion
from rlhf_npu.errors import RewardError
from rlhf_npu.roles.group_filter import Group, GroupFilter
from rlhf_npu.roles.scoring import ScoredResponse
from tests.rewards.samples import sample

COMPLETION = Completion((1,), (0.0,), finished=True)


def scored(score: float, extra: dict[str, Any] | None = None, failed: str | None = None) -> ScoredResponse:
    return ScoredResponse(1, "test", "1", "2", "3", score, True, extra or {}, None, failed)


def group(index: int, scores: list[float], **extra: list[float]) -> Group:
    lines = [
        scored(score, {name: values[place] for name, values in extra.items()}) for place, score in enumerate(scores)
    ]
    return Group(sample("3", index=index), [COMPLETION] * len(scores), lines)


def indices(groups: list[Group]) -> list[int]:
    return [group.prompt.index for group in groups]


SILENT, TELLING = [1.0, 1.0], [0.0, 1.0]


def test_groups_with_signal_are_kept_until_there_are_enough() -> None:
    chosen = GroupFilter(3, "score")
    chosen.add([group(0, SILENT), group(1, TELLING)])
    assert chosen.missing == 2
    chosen.add([group(2, TELLING), group(3, SILENT)])
    assert chosen.missing == 1
    chosen.add([group(4, TELLING), group(5, TELLING)])
    assert chosen.missing == 0
    kept, generated, counts = chosen.take()
    assert indices(kept) == [1, 2, 4]
    assert indices(generated) == [0, 1, 2, 3, 4, 5]
    assert vars(counts) == {"kept": 3, "filled": 0, "thrown_no_signal": 2, "thrown_surplus": 1}


def test_groups_without_signal_fill_up_in_the_order_of_generating() -> None:
    chosen = GroupFilter(3, "score")
    chosen.add([group(0, SILENT), group(1, SILENT), group(2, TELLING), group(3, SILENT)])
    kept, _, counts = chosen.take()
    assert indices(kept) == [0, 1, 2]
    assert vars(counts) == {"kept": 1, "filled": 2, "thrown_no_signal": 1, "thrown_surplus": 0}


def test_the_next_step_begins_anew() -> None:
    chosen = GroupFilter(1, "score")
    chosen.add([group(0, TELLING)])
    chosen.take()
    assert chosen.missing == 1
    chosen.add([group(7, SILENT)])
    kept, generated, _ = chosen.take()
    assert indices(kept) == indices(generated) == [7]


@given(
    st.integers(1, 6),
    st.lists(
        st.lists(st.lists(st.sampled_from([0.0, 0.5]), min_size=2, max_size=3), min_size=6, max_size=6), min_size=1
    ),
)
def test_every_rank_trains_on_its_share_and_every_prompt_is_counted_once(
    share: int, rounds: list[list[list[float]]]
) -> None:
    chosen = GroupFilter(share, "score")
    for batch in rounds:
        chosen.add([group(place, scores) for place, scores in enumerate(batch)])
    telling = sum(min(scores) < max(scores) for batch in rounds for scores in batch)
    assert chosen.missing == max(0, share - telling)
    kept, generated, counts = chosen.take()
    assert len(kept) == counts.kept + counts.filled == share
    assert sum(vars(counts).values()) == len(generated) == 6 * len(rounds)
    assert counts.kept == min(share, telling) == sum(len({line.score for line in one.scored}) > 1 for one in kept)


def test_another_part_of_the_reward_may_decide() -> None:
    chosen = GroupFilter(1, "acc")
    chosen.add([group(0, TELLING, acc=[1, 1]), group(1, SILENT, acc=[True, False])])
    kept, _, counts = chosen.take()
    assert indices(kept) == [1]
    assert (counts.kept, counts.thrown_no_signal) == (1, 1)


def test_a_part_that_the_reward_does_not_have() -> None:
    with pytest.raises(
        RewardError, match=r"filter_groups\.metric=acc: .* under that name beside its score, but length;"
    ):
        GroupFilter(1, "acc").add([group(0, TELLING, length=[1, 2])])


def test_a_response_that_failed_is_no_difference() -> None:
    failed = Group(sample("3"), [COMPLETION] * 3, [scored(1.0), scored(0.0, failed="it raised"), scored(1.0)])
    chosen = GroupFilter(1, "score")
    chosen.add([failed])
    assert chosen.missing == 1
