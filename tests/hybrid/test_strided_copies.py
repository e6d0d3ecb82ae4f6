"""Copies that are cut at a range of their source are, put together, the whole copy."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from rlhf_npu.hybrid.resharding.strided_copies import Place, simple_copy

VIEWS = {
    "whole": lambda t: t,
    "rows": lambda t: t[3:9],
    "columns": lambda t: t[:, 5:11],
    "transposed": lambda t: t.T,
    "block of rows and columns, transposed": lambda t: t[2:7, 3:5].T,
    "every second row": lambda t: t[::2],
    "three dimensions, two exchanged": lambda t: t.view(4, 3, 20).transpose(0, 1),
    "one column": lambda t: t[:, 7],
    "one element": lambda t: t[5, 5],
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("bounds", [(0, 240), (0, 1, 2, 97, 98, 99, 240), (0, 20, 40, 143, 240), range(241)])
def test_the_parts_of_a_copy_are_the_whole(name: str, bounds: tuple[int, ...]) -> None:
    source = torch.arange(240.0)
    view = VIEWS[name](source.view(12, 20))
    expected = torch.full((12, 20), -1.0)
    room = VIEWS[name](expected) if name != "transposed" else expected.view(20, 12)
    room.copy_(view)
    copy = simple_copy(Place.of(view), Place.of(room))
    assert copy is not None
    made = torch.full((12, 20), -1.0)
    for start, stop in pairwise(bounds):
        for part in copy.within(start, stop):
            piece = source[start:stop].clone()  # nothing outside of the range can be read
            part.target.view_of(made).copy_(part.from_source(-start).source.view_of(piece))
    assert torch.equal(made, expected)


def test_a_large_copy_is_cut_into_few() -> None:
    rows, columns = 18944, 3584
    half = Place(columns // 2, (rows, columns // 2), (columns, 1))
    copy = simple_copy(half, Place(0, (rows, columns // 2), (columns // 2, 1)))
    assert copy is not None
    parts = [part for start in range(0, rows * columns, 1 << 24) for part in copy.within(start, start + (1 << 24))]
    assert len(parts) <= 3 * len(range(0, rows * columns, 1 << 24))
    assert sum(part.source.numel for part in parts) == half.numel


def test_a_source_that_is_read_twice_is_no_simple_copy() -> None:
    assert simple_copy(Place(0, (4, 8), (0, 1)), Place(0, (4, 8), (8, 1))) is None
    assert simple_copy(Place(0, (4, 8), (4, 1)), Place(0, (4, 8), (8, 1))) is None
