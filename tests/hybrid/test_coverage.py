"""A tensor of which one element is not written, or is written twice, is found, however its writes are cut."""

from __future__ import annotations

import torch

from rlhf_npu.hybrid.resharding.coverage import uncovered
from rlhf_npu.hybrid.resharding.strided_copies import Place

CPU = torch.device("cpu")
WHOLE = Place(0, (6, 8), (8, 1))
LEFT, RIGHT = Place(0, (6, 4), (8, 1)), Place(4, (6, 4), (8, 1))


def test_halves_by_rows_by_columns_and_transposed_are_the_whole() -> None:
    assert uncovered(WHOLE, 48, [Place(0, (48,), (1,))], CPU) is None
    assert uncovered(WHOLE, 48, [LEFT, RIGHT], CPU) is None
    assert uncovered(WHOLE, 48, [LEFT, Place(4, (4, 6), (1, 8))], CPU) is None
    assert uncovered(WHOLE, 48, [Place(0, (47,), (1,)), Place(47, (), ())], CPU) is None


def test_what_is_missing_and_what_is_written_twice_are_counted() -> None:
    assert uncovered(WHOLE, 48, [], CPU) == "of 48 elements 48 are not written, 0 more than once"
    assert uncovered(WHOLE, 48, [LEFT], CPU) == "of 48 elements 24 are not written, 0 more than once"
    assert uncovered(WHOLE, 48, [LEFT, LEFT], CPU) == "of 48 elements 24 are not written, 24 more than once"
    assert uncovered(WHOLE, 48, [Place(0, (47,), (1,))], CPU) == "of 48 elements 1 are not written, 0 more than once"


def test_only_the_tensors_own_part_of_a_storage_counts() -> None:
    assert uncovered(Place(8, (2, 8), (8, 1)), 48, [Place(8, (16,), (1,))], CPU) is None
    assert uncovered(Place(8, (3, 8), (8, 1)), 48, [Place(8, (16,), (1,))], CPU) is not None
