"""Every example of a batch goes to one rank, and the ranks stay in step."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rlhf_npu.data.dealing import deal

MOST = 64


@given(ranks=st.integers(1, 5), data=st.data())
def test_ranks_have_as_many_examples_and_micro_batches(ranks: int, data: st.DataObject) -> None:
    count = ranks * data.draw(st.integers(1, 8))
    tokens = data.draw(st.lists(st.integers(1, MOST), min_size=count, max_size=count))
    indices = data.draw(st.permutations(range(count)))
    of = dict(zip(indices, tokens, strict=True))
    plans = deal(indices, tokens, ranks, MOST)
    assert len(plans) == ranks
    assert len({len(plan) for plan in plans}) == 1
    assert {sum(map(len, plan)) for plan in plans} == {count // ranks}
    assert sorted(index for plan in plans for part in plan for index in part) == sorted(indices)
    assert max(sum(of[index] for index in part) for plan in plans for part in plan) <= MOST


def test_long_and_short_examples_are_spread() -> None:
    plans = deal(range(8), [60, 50, 40, 30, 20, 10, 5, 5], 2, MOST)
    sums = [sum([60, 50, 40, 30, 20, 10, 5, 5][index] for part in plan for index in part) for plan in plans]
    assert max(sums) - min(sums) <= 10
