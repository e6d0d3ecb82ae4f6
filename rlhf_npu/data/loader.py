"""Batches of prompts, in an order that the seed and the epoch decide."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rlhf_npu.data.prompt_files import PromptDataset
from rlhf_npu.data.sample import PromptSample
from rlhf_npu.errors import DataError


@dataclass(frozen=True)
class Position:
    """How far a run has come through its prompts.

    Attributes:
        epoch: from 0.
        offset: prompts of this epoch that were taken, those of its order's beginning.
    """

    epoch: int = 0
    offset: int = 0


class PromptLoader:
    """Cuts a data set into batches of one size; the last prompts of an epoch that fill no batch are left out.

    `len(loader)` is the number of batches an epoch.

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
        self._batch_size = batch_size
        self._shuffle = shuffle
        self._seed = seed

    def __len__(self) -> int:
        return len(self._dataset) // self._batch_size

    def batches(self, epoch: int, offset: int = 0) -> Iterator[list[PromptSample]]:
        """The batches of one epoch, from 0: the same for the same seed and epoch, whatever came before.

        Args:
            offset: prompts of the epoch that were taken before.
        """
        order = order_of_epoch(len(self._dataset), epoch, seed=self._seed, shuffle=self._shuffle)[offset:]
        for start in range(0, len(order) - self._batch_size + 1, self._batch_size):
            yield [self._dataset[index] for index in order[start : start + self._batch_size].tolist()]

    def stream(self, start: Position | None = None) -> PromptStream:
        """The batches of all epochs, without an end, from `start` on.

        Raises:
            DataError: `start` is no place in these prompts: it was that of other ones.
        """
        start = start or Position()
        if start.epoch < 0 or not 0 <= start.offset <= len(self._dataset):
            raise DataError(
                f"the run is to go on at prompt {start.offset} of epoch {start.epoch}, but the training files have "
                f"{len(self._dataset)} prompts; go on with the files that it was begun with"
            )
        return PromptStream(self, self._batch_size, start)


class PromptStream(Iterator[list[PromptSample]]):
    """Batches without an end.

    Attributes:
        position: where the next batch comes from; a stream that starts there gives the same batches as this one.
    """

    def __init__(self, loader: PromptLoader, batch_size: int, start: Position) -> None:
        self.position = start
        self._loader = loader
        self._batch_size = batch_size
        self._batches = loader.batches(start.epoch, start.offset)

    def __next__(self) -> list[PromptSample]:
        batch = next(self._batches, None)
        if batch is None:
            self.position = Position(self.position.epoch + 1)
            self._batches = self._loader.batches(self.position.epoch)
            batch = next(self._batches)
        self.position = Position(self.position.epoch, self.position.offset + self._batch_size)
        return batch


def order_of_epoch(count: int, epoch: int, *, seed: int, shuffle: bool) -> np.ndarray:
    """In which order an epoch, from 0, takes `count` records: the same for the same seed, whatever came before.

    Returns:
        int64 (count,).
    """
    indices = np.arange(count)
    if shuffle:
        np.random.default_rng((seed, epoch)).shuffle(indices)
    return indices
