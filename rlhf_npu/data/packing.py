"""Examples of any lengths side by side in one row, with nothing padded, and a prompt once for all its completions.

A packed row is a run of segments: each prompt, then each of its completions. Token i attends to token j if j <= i and
j is in i's own segment or in the prompt's. Positions go on from the prompt's in each completion, so that each of them
is computed as if it stood alone behind the prompt.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rlhf_npu.errors import DataError


@dataclass(frozen=True)
class Completion:
    """Tokens that follow a prompt.

    Attributes:
        input_ids: (C,) int32 or int64, C >= 1.
        mask: (C,) bool; trained where True.
    """

    input_ids: np.ndarray
    mask: np.ndarray

    def __post_init__(self) -> None:
        if self.input_ids.ndim != 1 or not len(self.input_ids) or self.mask.shape != self.input_ids.shape:
            raise DataError(
                f"a completion has input_ids of shape {self.input_ids.shape} and a mask of {self.mask.shape}; both "
                "must be (C,) with C of 1 at least"
            )
        if self.mask.dtype != np.bool_:
            raise DataError(f"a completion's mask is of {self.mask.dtype}; it must be of bool")


@dataclass(frozen=True)
class Example:
    """A prompt and the completions that share it: one, or two that are compared.

    Attributes:
        prompt: (P,) ids; may be empty if no completion trains its first token, which nothing predicts then.
        completions: chosen before rejected.
    """

    prompt: np.ndarray
    completions: tuple[Completion, ...]

    def __post_init__(self) -> None:
        if not self.completions:
            raise DataError("an example has no completion")
        if not len(self.prompt) and any(completion.mask[0] for completion in self.completions):
            raise DataError(
                "an example has no prompt and trains its completion's first token, which nothing predicts; leave the "
                "token out of the mask, or let the prompt be the tokenizer's BOS"
            )

    @property
    def tokens(self) -> int:
        """What it takes packed: the prompt counts once."""
        return len(self.prompt) + sum(len(completion.input_ids) for completion in self.completions)


@dataclass(frozen=True)
class PackedBatch:
    """N tokens of which K are trained, of R completions.

    Attributes:
        input_ids, position_ids: (1, N) int64.
        segment: (N,) int64, the number of a token's segment in the row.
        parent: (N,) int64, the segment of the prompt that a token sees beside its own; its own for a prompt's.
        source: (K,) int64, places in the row whose hidden states predict.
        target: (K,) int64, the token ids that they predict.
        row: (K,) int64, to which completion each belongs: 0 to R - 1, by examples, then by their completions.
        last: (R,) int64, the place of each completion's last token.
        rows: R.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segment: torch.Tensor
    parent: torch.Tensor
    source: torch.Tensor
    target: torch.Tensor
    row: torch.Tensor
    last: torch.Tensor
    rows: int


def cut(tokens: Sequence[int] | np.ndarray, max_tokens: int, at_least: int = 1) -> list[list[int]]:
    """Cut examples of so many tokens into micro-batches of `max_tokens` at most, about as few and as even as can be.

    The number is the larger of `at_least` and of what `cut(tokens, max_tokens)` gives, so ranks that pass the largest
    of their own numbers as `at_least` have the same.

    Returns:
        the examples' indices in each micro-batch; always the same for the same arguments.

    Raises:
        DataError: an example is longer than `max_tokens`, or there are fewer examples than `at_least`.
    """
    sizes = [int(size) for size in tokens]
    for index, size in enumerate(sizes):
        if not 0 < size <= max_tokens:
            raise DataError(f"example {index} has {size} tokens; a micro-batch holds from 1 to {max_tokens}")
    if len(sizes) < at_least:
        raise DataError(f"{len(sizes)} examples cannot be cut into {at_least} micro-batches")
    order = sorted(range(len(sizes)), key=lambda index: (-sizes[index], index))
    fewest = _first_fit(order, sizes, max_tokens)
    number = max(at_least, len(fewest))
    even = _lightest_first(order, sizes, number)
    fits = all(sum(sizes[index] for index in group) <= max_tokens for group in even)
    return sorted(sorted(group) for group in (even if fits else _split_largest(fewest, sizes, number)))


def pack(examples: Sequence[Example], device: torch.device) -> PackedBatch:
    """Lay `examples` into one row on `device`."""
    row = _Row()
    for example in examples:
        row.add(example)
    arrays = {name: np.concatenate(parts).astype(np.int64) for name, parts in row.parts.items()}
    tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    return PackedBatch(
        input_ids=tensors.pop("input_ids")[None],
        position_ids=tensors.pop("position_ids")[None],
        last=torch.tensor(row.last, device=device),
        rows=len(row.last),
        **tensors,
    )


class _Row:
    """A row as it grows: the parts of each of PackedBatch's arrays."""

    def __init__(self) -> None:
        names = ("input_ids", "position_ids", "segment", "parent", "source", "target", "row")
        self.parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
        self.last: list[int] = []
        self._tokens = self._segments = 0

    def add(self, example: Example) -> None:
        prompt, first = self._segments, len(example.prompt)
        if first:
            self._add_segment(example.prompt, 0, prompt)
        before = self._tokens - 1
        for completion in example.completions:
            self._add_targets(completion, before)
            self._add_segment(completion.input_ids, first, prompt if first else self._segments)
            self.last.append(self._tokens - 1)

    def _add_segment(self, ids: np.ndarray, position: int, parent: int) -> None:
        size = len(ids)
        self.parts["input_ids"].append(ids)
        self.parts["position_ids"].append(np.arange(position, position + size))
        self.parts["segment"].append(np.full(size, self._segments))
        self.parts["parent"].append(np.full(size, parent))
        self._tokens += size
        self._segments += 1

    def _add_targets(self, completion: Completion, before: int) -> None:
        """`before`: the place of the prompt's last token, which predicts a completion's first."""
        start, mask = self._tokens, completion.mask
        sources = np.arange(start - 1, start - 1 + len(mask))
        sources[0] = before
        self.parts["source"].append(sources[mask])
        self.parts["target"].append(completion.input_ids[mask])
        self.parts["row"].append(np.full(int(mask.sum()), len(self.last)))


def _first_fit(order: Iterable[int], tokens: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Each example into the first group that has room for it; the largest come first (first fit decreasing)."""
    groups: list[list[int]] = []
    room: list[int] = []
    for index in order:
        place = next((place for place, left in enumerate(room) if left >= tokens[index]), len(groups))
        if place == len(groups):
            groups.append([])
            room.append(max_tokens)
        groups[place].append(index)
        room[place] -= tokens[index]
    return groups


def _lightest_first(order: Iterable[int], tokens: Sequence[int], number: int) -> list[list[int]]:
    """Each example into the lightest of `number` groups; the largest come first (longest processing time first)."""
    groups: list[list[int]] = [[] for _ in range(number)]
    loads = [(0, place) for place in range(number)]
    for index in order:
        load, place = loads[0]
        groups[place].append(index)
        heapq.heapreplace(loads, (load + tokens[index], place))
    return groups


def _split_largest(groups: list[list[int]], tokens: Sequence[int], number: int) -> list[list[int]]:
    """Halve the group of most tokens that can be, until there are `number` of them."""
    while len(groups) < number:
        largest = max((group for group in groups if len(group) > 1), key=lambda group: sum(tokens[i] for i in group))
        groups = [group for group in groups if group is not largest] + _lightest_first(largest, tokens, 2)
    return groups
