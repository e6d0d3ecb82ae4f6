"""Examples in memory-mapped files: what a process needs of them is read when it is asked for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np

from rlhf_npu.data.builtin import CACHE_VARIABLE
from rlhf_npu.data.drafts import COMPLETIONS, Kind
from rlhf_npu.data.packing import Completion, Example
from rlhf_npu.errors import DataError

_TOKENS, _FACTS = "tokens.bin", "facts.json"


@dataclass
class Block:
    """Examples one after the other, as they stand in the files.

    A token that is trained is its id, one of a completion that is not is ~id (-1 - id), so one number holds both.

    Attributes:
        tokens: int32 of each example's prompt and completions.
        lengths: int32 (n, 1 + completions): of the prompt and of each completion.
        places: int64 (n, 2): index of the file, row there.
        labels: bool (n,).
        margins: float32 (n,).
        skipped, truncated: left out, and cut, for their length.
        problems: what is wrong with others.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    places: np.ndarray
    labels: np.ndarray
    margins: np.ndarray
    skipped: int = 0
    truncated: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Facts:
    """What is known of the examples as a whole."""

    kind: Kind
    count: int
    skipped: int
    truncated: int
    largest_token: int


class ExampleDataset(Sequence[Example]):
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

    def __init__(self, folder: Path, files: Sequence[str]) -> None:
        facts = Facts(**json.loads((folder / _FACTS).read_text(encoding="utf-8")))
        pieces = 1 + COMPLETIONS[facts.kind]
        self.kind, self.skipped, self.truncated = facts.kind, facts.skipped, facts.truncated
        self.largest_token = facts.largest_token
        self._folder = folder
        self._files = tuple(files)
        self._count = facts.count
        self._ids = _mapped(folder / _TOKENS, "int32")
        self._starts = _mapped(folder / "starts.bin", "int64")
        self._lengths = _mapped(folder / "lengths.bin", "int32").reshape(-1, pieces)
        self._places = _mapped(folder / "places.bin", "int64").reshape(-1, 2)
        self.tokens = _mapped(folder / "packed.bin", "int64")
        self.label = _mapped(folder / "labels.bin", "bool")
        self.margin = _mapped(folder / "margins.bin", "float32")

    def __len__(self) -> int:
        return self._count

    def __reduce__(self) -> tuple[Any, ...]:
        # By name: another process maps the files itself instead of getting a copy of them.
        return _open_first, (self._folder, self._files, self._count)

    @property
    def digest(self) -> str:
        """What the examples are made of, and how many of them there are."""
        return f"{self._folder.name}-{self._count}"

    def first(self, count: int) -> ExampleDataset:
        """The first `count` examples, or all if there are fewer."""
        dataset = ExampleDataset(self._folder, self._files)
        dataset._count = min(count, self._count)
        dataset.tokens = dataset.tokens[: dataset._count]
        return dataset

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Example, ...]: ...

    def __getitem__(self, index: int | slice) -> Example | tuple[Example, ...]:
        if isinstance(index, slice):
            return tuple(self[place] for place in range(*index.indices(self._count)))
        place = range(self._count)[index]
        start, lengths = int(self._starts[place]), self._lengths[place]
        parts = np.split(np.array(self._ids[start : start + int(lengths.sum())]), np.cumsum(lengths[:-1]))
        return Example(parts[0], tuple(Completion(np.where(part < 0, ~part, part), part >= 0) for part in parts[1:]))

    def location(self, index: int) -> str:
        """`file:row` of an example, for people to read."""
        file, row = self._places[range(self._count)[index]]
        return f"{self._files[int(file)]}:{row}"


def _open_first(folder: Path, files: Sequence[str], count: int) -> ExampleDataset:
    if not folder.is_dir():
        raise DataError(f"{folder}: not on this machine; set {CACHE_VARIABLE} to a folder that all nodes share")
    return ExampleDataset(folder, files).first(count)


def write_examples(folder: Path, kind: Kind, blocks: Iterable[Block]) -> Facts:
    """Write blocks as files that `ExampleDataset` reads, holding one in memory at a time."""
    count = skipped = truncated = start = 0
    largest = -1
    names = ("starts", "lengths", "packed", "places", "labels", "margins")
    for name in ("tokens", *names):
        (folder / f"{name}.bin").touch()
    for block in blocks:
        packed = block.lengths.sum(1, dtype=np.int64)
        starts = start + np.cumsum(packed) - packed
        columns = (starts, block.lengths, packed, block.places, block.labels, block.margins)
        for name, column in zip(("tokens", *names), (block.tokens, *columns), strict=True):
            with (folder / f"{name}.bin").open("ab") as file:
                file.write(np.ascontiguousarray(column).tobytes())
        largest = max(largest, int(np.maximum(block.tokens, ~block.tokens).max(initial=-1)))
        start += int(packed.sum())
        count += len(packed)
        skipped += block.skipped
        truncated += block.truncated
    facts = Facts(kind, count, skipped, truncated, largest)
    (folder / _FACTS).write_text(json.dumps(asdict(facts)), encoding="utf-8")
    return facts


def block_of(examples: Sequence[Example], places: Sequence[tuple[int, int]], pieces: int) -> Block:
    """Examples as a block, without labels, margins and problems."""
    tokens = [part for example in examples for part in (example.prompt, *map(_marked, example.completions))]
    lengths = [[len(example.prompt), *(len(each.input_ids) for each in example.completions)] for example in examples]
    return Block(
        np.concatenate([np.empty(0, np.int32), *tokens], dtype=np.int32),
        np.array(lengths, np.int32).reshape(-1, pieces),
        np.array(places, np.int64).reshape(-1, 2),
        np.zeros(len(examples), bool),
        np.zeros(len(examples), np.float32),
    )


def _marked(completion: Completion) -> np.ndarray:
    return np.where(completion.mask, completion.input_ids, ~completion.input_ids)


def _mapped(path: Path, dtype: str) -> np.ndarray:
    if not path.stat().st_size:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")
