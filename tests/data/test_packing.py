"""Examples are cut into micro-batches and laid into one row."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_npu.data.packing import Completion, Example, cut, pack
from rlhf_npu.errors import DataError

CPU = torch.device("cpu")
SIZES = st.lists(st.integers(1, 64), min_size=1, max_size=60)


def _completion(ids: list[int], mask: list[bool] | None = None) -> Completion:
    return Completion(np.array(ids, dtype=np.int32), np.array(mask or [True] * len(ids)))


def _example(prompt: list[int], *completions: Completion) -> Example:
    return Example(np.array(prompt, dtype=np.int32), completions)


@given(SIZES, st.integers(64, 200), st.data())
def test_a_cut_keeps_each_example_once_within_bounds(sizes: list[int], most: int, data: st.DataObject) -> None:
    at_least = data.draw(st.integers(1, len(sizes)))
    groups = cut(sizes, most, at_least)
    assert sorted(index for group in groups for index in group) == list(range(len(sizes)))
    assert all(0 < sum(sizes[index] for index in group) <= most for group in groups)
    assert len(groups) == max(at_least, len(cut(sizes, most)))
    assert groups == cut(np.array(sizes), most, at_least)


@given(SIZES, st.integers(64, 200))
def test_a_cut_is_no_worse_than_its_algorithm_promises(sizes: list[int], most: int) -> None:
    fewest = math.ceil(sum(sizes) / most)
    assert len(cut(sizes, most)) <= max(1, 2 * fewest)


@given(SIZES, st.integers(1, 8))
def test_where_one_micro_batch_would_hold_all_the_cut_is_even(sizes: list[int], number: int) -> None:
    number = min(number, len(sizes))
    loads = [sum(sizes[index] for index in group) for group in cut(sizes, sum(sizes), number)]
    assert max(loads) - min(loads) <= max(sizes)


def test_ranks_agree_on_the_number_of_micro_batches() -> None:
    mine, other = [50, 50, 50, 50], [10, 10, 10, 10]
    number = max(len(cut(sizes, 64)) for sizes in (mine, other))
    assert [len(cut(sizes, 64, number)) for sizes in (mine, other)] == [4, 4]


def test_a_cut_that_cannot_be_even_still_has_the_number_asked_for() -> None:
    sizes = [6, 5, 5, 4, 4, 3, 3]  # lightest first would burst three micro-batches of 10
    assert [sum(sizes[index] for index in group) for group in cut(sizes, 10)] == [10, 10, 10]
    assert len(cut(sizes, 10, 5)) == 5


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(DataError, match="example 1 has 9 tokens; a micro-batch holds from 1 to 8"):
        cut([3, 9], 8)
    with pytest.raises(DataError, match="2 examples cannot be cut into 3 micro-batches"):
        cut([3, 4], 8, 3)


def test_a_row_holds_each_prompt_once_and_the_places_that_predict() -> None:
    pair = _example([11, 12, 13], _completion([21, 22]), _completion([31, 32, 33], [True, False, True]))
    single = _example([], _completion([41, 42, 43], [False, True, True]))
    batch = pack([pair, single], CPU)
    assert batch.input_ids.tolist() == [[11, 12, 13, 21, 22, 31, 32, 33, 41, 42, 43]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2]]
    assert batch.segment.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3]
    assert batch.parent.tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 3, 3, 3]
    assert batch.source.tolist() == [2, 3, 2, 6, 8, 9]
    assert batch.target.tolist() == [21, 22, 31, 33, 42, 43]
    assert batch.row.tolist() == [0, 0, 1, 1, 2, 2]
    assert batch.last.tolist() == [4, 7, 10]
    assert batch.rows == 3
    assert [pair.tokens, single.tokens] == [8, 3]
    assert {tensor.dtype for tensor in vars(batch).values() if isinstance(tensor, torch.Tensor)} == {torch.int64}


def test_a_row_may_train_nothing() -> None:
    batch = pack([_example([1], _completion([2, 3], [False, False]))], CPU)
    assert batch.source.shape == batch.target.shape == batch.row.shape == (0,)
    assert batch.last.tolist() == [2]


def test_examples_that_mean_nothing_are_refused() -> None:
    with pytest.raises(DataError, match="trains its completion's first token, which nothing predicts"):
        _example([], _completion([1, 2]))
    with pytest.raises(DataError, match="no completion"):
        _example([1])
    with pytest.raises(DataError, match=r"input_ids of shape \(0,\)"):
        _completion([], [])
    with pytest.raises(DataError, match=r"a mask of \(1,\)"):
        _completion([1, 2], [True])
    with pytest.raises(DataError, match="of int64; it must be of bool"):
        Completion(np.array([1]), np.array([1]))
