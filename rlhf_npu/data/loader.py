"""Batches of records, in an order that the seed and the epoch decide."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from rlhf_npu.data.prompt_files import PromptDataset
from rlhf_npu.data.sample import PromptSample
from rlhf_npu.errors import DataError


@dataclass(frozen=True)
class Position:
    """How far a run has come through its records.

    Attributes:
        epoch: from 0.
        offset: records of this epoch that were taken, those of its order's beginning.
    """

    epoch: int = 0
    offset: int = 0


class BatchOrder:
    """Which records make which batch; the last records of an epoch that fill no batch are left out.

    `len(order)` is the number of batches an epoch.

    Args:
        count: records, at least `batch_size`.
    """

    def __init__(self, count: int, batch_size: int, shuffle: bool, seed: int) -> None:
        self.batch_size = batch_size
        self._count = count
        self._shuffle = shuffle
        self._seed = seed

    def __len__(self) -> int:
        return self._count // self.batch_size

    def batches(self, epoch: int, offset: int = 0) -> Iterator[list[int]]:
        """The batches of one epoch, from 0: the same for the same seed and epoch, whatever came before.

        Args:
            offset: records of the epoch that were taken before.
        """
        order = np.arange(self._count)
        if self._shuffle:
            np.random.default_rng((self._seed, epoch)).shuffle(order)
        for first in range(offset, self._count - self.batch_size + 1, self.batch_size):
            yield order[first : first + self.batch_size].tolist()

    def stream(self, start: Position | None = None) -> BatchStream:
        """The batches of all epochs, without an end, from `start` on.

        Raises:
            DataError: `start` is no place in these records: it was that of other ones.
        """
        start = start or Position()
        if start.epoch < 0 or not 0 <= start.offset <= self._count:
            raise DataError(
                f"the run is to go on at record {start.offset} of epoch {start.epoch}, but the training files have "
                f"{self._count} records; go on with the files that it was begun with"
            )
        return BatchStream(self, start)


class BatchStream(Iterator[list[int]]):
    """Batches without an end.

    Attributes:
        position: where the next batch comes from; a stream that starts there gives the same batches as this one.
    """

    def __init__(self, order: BatchOrder, start: Position) -> None:
        self.position = start
        self._order = order
        self._batches = order.batches(start.epoch, start.offset)

    def __next__(self) -> list[int]:
        batch = next(self._batches, None)
        if batch is None:
            self.position = Position(self.position.epoch + 1)
            self._batches = self._order.batches(self.position.epoch)
            batch = next(self._batches)
        self.position = Position(self.position.epoch, self.position.offset + self._order.batch_size)
        return batch


class PromptLoader:
    """Cuts a data set into batches of one size, as `BatchOrder` says.

    Raises:
        DataError: the data set has fewer prompts than a batch.
    """

    def __init__(self, dataset: PromptDataset, batch_size: int, shuffle: bool, seed: int) -> None:
        if batch_size > len(dataset):
            raise DataError(
                f"data.train_batch_size={batch_size}: the training files have {len(dataset)} prompts "
                f"({dataset.skipped} skipped for their length); set it to at most that"
            )
        self._dataset = dataset
        self._order = BatchOrder(len(dataset), batch_size, shuffle, seed)

    def __len__(self) -> int:
        return len(self._order)

    def batches(self, epoch: int) -> Iterator[list[PromptSample]]:
        """The batches of one epoch, from 0: the same for the same seed and epoch, whatever came before."""
        return (read(self._dataset, indices) for indices in self._order.batches(epoch))

    def stream(self, start: Position | None = None) -> PromptStream:
        """The batches of all epochs, without an end, from `start` on.

        Raises:
            DataError: `start` is no place in these prompts: it was that of other ones.
        """
        return PromptStream(self._dataset, self._order.stream(start))


class PromptStream(Iterator[list[PromptSample]]):
    """Batches of prompts without an end."""

    def __init__(self, dataset: PromptDataset, indices: BatchStream) -> None:
        self._dataset = dataset
        self._indices = indices

    @property
    def position(self) -> Position:
        """Where the next batch comes from; a stream that starts there gives the same batches as this one."""
        return self._indices.position

    def __next__(self) -> list[PromptSample]:
        return read(self._dataset, next(self._indices))


def read(dataset: PromptDataset, indices: Iterable[int]) -> list[PromptSample]:
    """The prompts at `indices`."""
    return [dataset[index] for index in indices]
