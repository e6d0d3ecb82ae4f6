"""Copies that are cut at a range of their source are, put together, the whole copy."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
import torch

from rlhf_npu.hybrid.resharding.strided_copies import Place, StridedCopy, simple_copy

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


def test_a_cut_takes_no_longer_for_more_elements() -> None:
    flat = Place(0, (1 << 27,), (1,))
    copy = simple_copy(flat, flat)
    assert copy is not None
    start = time.perf_counter()
    (part,) = copy.within(5, (1 << 27) - 5)
    assert time.perf_counter() - start < 0.5  # seconds; element by element it takes ten
    assert part.source == Place(5, ((1 << 27) - 10,), (1,))


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("units", [2, 4])
def test_a_copy_in_units_is_the_same_copy(name: str, units: int) -> None:
    source = torch.arange(480, dtype=torch.int16)
    view = VIEWS[name](source.view(12, 40)[:, :20] if "dimensions" not in name else source[:240].view(12, 20))
    expected = torch.zeros(view.numel(), dtype=torch.int16)
    expected.view(view.shape).copy_(view)
    copy = simple_copy(Place.of(view), Place.of(expected.view(view.shape)))
    assert copy is not None
    wide = copy.in_units(units)
    rows = copy.source.sizes[-1:] != () and copy.source.strides[-1] == 1
    assert (wide is not None) is (rows and all(number % units == 0 for number in _counted(copy)))
    if wide is not None:
        integers = {2: torch.int32, 4: torch.int64}[units]
        made = torch.zeros(view.numel(), dtype=torch.int16)
        wide.target.view_of(made.view(integers)).copy_(wide.source.view_of(source.view(integers)))
        assert torch.equal(made, expected)


def _counted(copy: StridedCopy) -> list[int]:
    """All that a unit must divide: where the views begin, their rows' length, and how far their rows are apart."""
    places = (copy.source, copy.target)
    return [number for place in places for number in (place.offset, place.sizes[-1], *place.strides[:-1])]
