"""Examples in memory-mapped files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlhf_npu.data.drafts import COMPLETIONS, Kind
from rlhf_npu.data.mapped import Block, MappedDataset, columns_in, mapped, write_facts
from rlhf_npu.data.packing import Completion, Example


@dataclass(kw_only=True)
class ExampleBlock(Block):
    """Examples one after the other, as they stand in the files.

    A token that is trained is its id, one of a completion that is not is ~id (-1 - id), so one number holds both.

    Attributes:
        tokens: int32 of each example's prompt and completions.
        lengths: int32 (n, 1 + completions): of the prompt and of each completion.
        labels: bool (n,).
        margins: float32 (n,).
    """

    tokens: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray
    margins: np.ndarray


class ExampleDataset(MappedDataset[Example]):
    """Examples in the order of their files.

    Attributes:
        kind: sft, pairs or unpaired.
        tokens: (n,) int64, of each example as it is packed, the prompt counted once.
        label: (n,) bool, unpaired: whether the completion is desirable.
        margin: (n,) float32, pairs: by how much the chosen completion is better; 0 where the record says nothing.
        skipped: examples left out because they are too long.
        truncated: examples cut because they are too long.
        largest_token: the largest id; -1 where there is no example.
    """

    def __init__(self, folder: Path, files: Sequence[str], count: int | None = None) -> None:
        super().__init__(folder, files, count)
        self.kind: Kind = self.facts["kind"]
        self.largest_token = int(self.facts["largest_token"])
        self._ids = mapped(folder / "tokens.bin", "int32")
        self._starts = mapped(folder / "starts.bin", "int64")
        self._lengths = mapped(folder / "lengths.bin", "int32").reshape(-1, 1 + COMPLETIONS[self.kind])
        self.tokens = mapped(folder / "packed.bin", "int64")[: len(self)]
        self.label = mapped(folder / "labels.bin", "bool")
        self.margin = mapped(folder / "margins.bin", "float32")

    def _read(self, place: int) -> Example:
        start, lengths = int(self._starts[place]), self._lengths[place]
        parts = np.split(np.array(self._ids[start : start + int(lengths.sum())]), np.cumsum(lengths[:-1]))
        return Example(parts[0], tuple(Completion(np.where(part < 0, ~part, part), part >= 0) for part in parts[1:]))


def write_examples(folder: Path, kind: Kind, blocks: Iterable[ExampleBlock]) -> None:
    """Write blocks as files that `ExampleDataset` reads, holding one in memory at a time."""
    skipped = truncated = start = 0
    largest = -1
    with columns_in(folder, "tokens", "starts", "lengths", "packed", "places", "labels", "margins") as columns:
        for block in blocks:
            packed = block.lengths.sum(1, dtype=np.int64)
            starts = start + np.cumsum(packed) - packed
            columns.add({**vars(block), "starts": starts, "packed": packed})
            largest = max(largest, int(np.maximum(block.tokens, ~block.tokens).max(initial=-1)))
            start += int(packed.sum())
            skipped += block.skipped
            truncated += block.truncated
    write_facts(folder, kind=kind, skipped=skipped, truncated=truncated, largest_token=largest)


def block_of(examples: Sequence[Example], places: Sequence[tuple[int, int]], pieces: int) -> ExampleBlock:
    """Examples as a block, without labels, margins and problems."""
    tokens = [part for example in examples for part in (example.prompt, *map(_marked, example.completions))]
    lengths = [[len(example.prompt), *(len(each.input_ids) for each in example.completions)] for example in examples]
    return ExampleBlock(
        tokens=np.concatenate([np.empty(0, np.int32), *tokens], dtype=np.int32),
        lengths=np.array(lengths, np.int32).reshape(-1, pieces),
        places=np.array(places, np.int64).reshape(-1, 2),
        labels=np.zeros(len(examples), bool),
        margins=np.zeros(len(examples), np.float32),
    )


def _marked(completion: Completion) -> np.ndarray:
    return np.where(completion.mask, completion.input_ids, ~completion.input_ids)
