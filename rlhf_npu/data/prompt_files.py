"""Prompts in files: what a process needs of them is read when it is asked for."""

from __future__ import annotations

import os
import pickle
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlhf_npu.data.mapped import Block, MappedDataset, columns_in, mapped, write_facts
from rlhf_npu.data.sample import PromptSample
from rlhf_npu.errors import DataError

_UTF_8 = ("utf-8", "surrogatepass")


@dataclass(kw_only=True)
class PromptBlock(Block):
    """Prompts one after the other.

    Attributes:
        content: of each prompt the ids, int32, its text, and pickled ground truth, extra_info and messages.
        sizes: int32 (n, 3): bytes of these three.
        largest: int32 (n,): the largest id.
        data_sources: n names.
    """

    content: bytes
    sizes: np.ndarray
    largest: np.ndarray
    data_sources: list[str]


class PromptDataset(MappedDataset[PromptSample]):
    """Prompts in the order of their files.

    Attributes:
        skipped: prompts left out because they are too long.
        truncated: prompts that were cut because they are too long.
    """

    def __init__(self, folder: Path, files: Sequence[str], count: int | None = None) -> None:
        super().__init__(folder, files, count)
        self._data_sources: list[str] = self.facts["data_sources"]
        self._content = _Content(folder / "content.bin")
        self._starts = mapped(folder / "starts.bin", "int64")
        self._sizes = mapped(folder / "sizes.bin", "int32").reshape(-1, 3)
        self._largest = mapped(folder / "largest.bin", "int32")
        self._sources = mapped(folder / "sources.bin", "int32")

    def without_prompt(self, index: int) -> PromptSample:
        """A prompt without its ids and its text, which most of the time goes into: for what reads the rest of many."""
        place = range(self._count)[index]
        ids, text, rest = self._sizes[place].tolist()
        content = self._content.read(int(self._starts[place]) + ids + text, rest)
        return self._sample(place, (), "", content)

    def first_of_each_source(self) -> list[int]:
        """Where each `data_source` comes first."""
        _, places = np.unique(self._sources[: self._count], return_index=True)
        return sorted(places.tolist())

    def with_ids_from(self, limit: int) -> list[tuple[int, int]]:
        """The prompts, and the largest id of each, that hold an id of at least `limit`."""
        places = np.flatnonzero(self._largest[: self._count] >= limit)
        return list(zip(places.tolist(), self._largest[places].tolist(), strict=True))

    def _read(self, place: int) -> PromptSample:
        ids, text, rest = self._sizes[place].tolist()
        content = self._content.read(int(self._starts[place]), ids + text + rest)
        numbers = tuple(np.frombuffer(content[:ids], np.int32).tolist())
        return self._sample(place, numbers, content[ids : ids + text].decode(*_UTF_8), content[ids + text :])

    def _sample(self, place: int, ids: tuple[int, ...], text: str, rest: bytes) -> PromptSample:
        ground_truth, extra_info, messages = pickle.loads(rest)
        file, row = self._places[place].tolist()
        source = self._data_sources[self._sources[place]]
        return PromptSample(place, ids, text, source, ground_truth, extra_info, self._files[file], row, messages)


class _Content:
    """A file that is read in pieces. Mapped, what was read of it would count as this process's memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, start: int, size: int) -> bytes:
        content = os.pread(self._descriptor, size, start)
        if len(content) < size:
            raise DataError(f"{self._path}: ends within a prompt; delete its folder to have it made again")
        return content


def write_prompts(folder: Path, blocks: Iterable[PromptBlock]) -> None:
    """Write blocks as files that `PromptDataset` reads, holding one in memory at a time."""
    skipped = truncated = start = 0
    numbers: dict[str, int] = {}
    with columns_in(folder, "content", "starts", "sizes", "largest", "sources", "places") as columns:
        for block in blocks:
            sizes = block.sizes.sum(1, dtype=np.int64)
            starts = start + np.cumsum(sizes) - sizes
            sources = [numbers.setdefault(name, len(numbers)) for name in block.data_sources]
            columns.add({**vars(block), "starts": starts, "sources": np.array(sources, np.int32)})
            start += len(block.content)
            skipped += block.skipped
            truncated += block.truncated
    write_facts(folder, skipped=skipped, truncated=truncated, data_sources=list(numbers))


def prompt_block(samples: Sequence[PromptSample], places: Sequence[tuple[int, int]]) -> PromptBlock:
    """Samples as a block; of each its place is taken instead of `index`, `file` and `row`.

    Args:
        places: index of the file and row there, of each.
    """
    parts = [
        (
            np.array(sample.prompt_ids, np.int32).tobytes(),
            sample.prompt_text.encode(*_UTF_8),
            pickled(sample),
        )
        for sample in samples
    ]
    return PromptBlock(
        places=np.array(places, np.int64).reshape(-1, 2),
        content=b"".join(part for each in parts for part in each),
        sizes=np.array([[len(part) for part in each] for each in parts], np.int32).reshape(-1, 3),
        largest=np.array([max(sample.prompt_ids) for sample in samples], np.int32),
        data_sources=[sample.data_source for sample in samples],
    )


def pickled(sample: PromptSample) -> bytes:
    """What a record carries beside its prompt's text; dates, decimals and bytes of a table stay what they are."""
    return pickle.dumps((sample.ground_truth, sample.extra_info, sample.messages), pickle.HIGHEST_PROTOCOL)
