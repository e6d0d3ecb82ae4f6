"""Strided copies as numbers: from where in one flat tensor to where in another, and how to cut them.

A weight's elements go from a tensor of the trainer to one of the rollout engine as a view of the one is copied to a
view of the other. Where only a range of the trainer's tensor is at hand, what of the copy reads it is found by
arithmetic on rows, never element by element.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Place:
    """Which elements of a flat tensor a view has: `torch.as_strided`'s arguments, in elements."""

    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, view: torch.Tensor) -> Place:
        """Where a view is in its storage."""
        return cls(int(view.storage_offset()), tuple(view.shape), tuple(view.stride()))

    @property
    def numel(self) -> int:
        """Elements of the view."""
        return _product(self.sizes)

    @property
    def end(self) -> int:
        """The element after the last one of the view."""
        return self.offset + _span(self) if self.numel else self.offset

    def in_units(self, elements: int) -> Place | None:
        """The same place, counted in units of neighbouring elements; None where it would cut a unit."""
        if not self.sizes or self.strides[-1] != 1:
            return None
        *outer, _ = self.strides
        if any(number % elements for number in (self.offset, self.sizes[-1], *outer)):
            return None
        sizes = (*self.sizes[:-1], self.sizes[-1] // elements)
        return Place(self.offset // elements, sizes, (*(stride // elements for stride in outer), 1))

    def view_of(self, flat: torch.Tensor, shift: int = 0) -> torch.Tensor:
        """The view of a tensor whose storage has this place `shift` elements later."""
        return torch.as_strided(flat, self.sizes, self.strides, self.offset + shift)


@dataclass(frozen=True)
class StridedCopy:
    """Elements of `source` become those of `target`, in the views' order; both have the same sizes."""

    source: Place
    target: Place

    def within(self, start: int, stop: int) -> list[StridedCopy]:
        """What of a simple copy reads elements `start` to `stop` of the flat source: a few copies at most."""
        first, span = self.source.offset, _span(self.source)
        if first + span <= start or first >= stop:
            return []
        if start <= first and first + span <= stop:
            return [self]
        stride, rows = self.source.strides[0], self.source.sizes[0]
        length = span - (rows - 1) * stride
        whole = range(max(0, -(-(start - first) // stride)), min(rows, (stop - first - length) // stride + 1))
        touched = range(max(0, (start - first - length) // stride + 1), min(rows, -(-(stop - first) // stride)))
        copies = [self._rows(whole)] if whole else []
        for row in sorted({touched[0], touched[-1]}) if touched else []:
            if row not in whole:
                copies += self._row(row).within(start, stop)
        return copies

    def in_units(self, elements: int) -> StridedCopy | None:
        """The same copy, counted in units of neighbouring elements; None where it would cut a unit."""
        source, target = self.source.in_units(elements), self.target.in_units(elements)
        return StridedCopy(source, target) if source and target else None

    def from_source(self, shift: int) -> StridedCopy:
        """The same copy out of a tensor in which the source begins `shift` elements later."""
        return replace(self, source=replace(self.source, offset=self.source.offset + shift))

    def _rows(self, rows: range) -> StridedCopy:
        return StridedCopy(_rows(self.source, rows), _rows(self.target, rows))

    def _row(self, row: int) -> StridedCopy:
        return StridedCopy(_row(self.source, row), _row(self.target, row))


def simple_copy(source: Place, target: Place) -> StridedCopy | None:
    """The copy with as few dimensions as it needs, the source's rows in order; None if elements are read twice.

    Raises:
        ValueError: the views differ in size.
    """
    if source.sizes != target.sizes:
        raise ValueError(f"a view of {list(source.sizes)} elements is no copy of one of {list(target.sizes)}")
    dimensions = [
        (stride, size, to) for size, stride, to in zip(source.sizes, source.strides, target.strides, strict=True)
    ]
    dimensions = [dimension for dimension in dimensions if dimension[1] != 1]
    dimensions.sort(key=lambda dimension: (-dimension[0], -dimension[1]))
    merged: list[tuple[int, int, int]] = []
    for stride, size, to in dimensions:
        if merged and (merged[-1][0], merged[-1][2]) == (stride * size, to * size):
            merged[-1] = (stride, merged[-1][1] * size, to)
        else:
            merged.append((stride, size, to))
    sizes = tuple(size for _, size, _ in merged)
    copy = StridedCopy(
        Place(source.offset, sizes, tuple(stride for stride, _, _ in merged)),
        Place(target.offset, sizes, tuple(to for _, _, to in merged)),
    )
    return copy if _rows_are_apart(copy.source) else None


def _rows_are_apart(place: Place) -> bool:
    inner = 1
    for size, stride in zip(reversed(place.sizes), reversed(place.strides), strict=True):
        if stride < inner:
            return False
        inner += (size - 1) * stride
    return True


def _span(place: Place) -> int:
    """Elements from the first to the last one of a view."""
    return 1 + sum((size - 1) * stride for size, stride in zip(place.sizes, place.strides, strict=True))


def _rows(place: Place, rows: range) -> Place:
    offset = place.offset + rows.start * place.strides[0]
    return replace(place, offset=offset, sizes=(len(rows), *place.sizes[1:]))


def _row(place: Place, row: int) -> Place:
    return Place(place.offset + row * place.strides[0], place.sizes[1:], place.strides[1:])


def _product(sizes: tuple[int, ...]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product
