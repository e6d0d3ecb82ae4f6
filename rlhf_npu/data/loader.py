"""Batches of prompts, in an order that the seed and the epoch decide."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from rlhf_npu.data.prompts import PromptDataset, PromptSample
from rlhf_npu.errors import DataError


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

    def batches(self, epoch: int) -> Iterator[list[PromptSample]]:
        """The batches of one epoch, from 0: the same for the same seed and epoch, whatever came before."""
        order = self._order(epoch)
        for start in range(0, len(self) * self._batch_size, self._batch_size):
            yield [self._dataset[index] for index in order[start : start + self._batch_size]]

    def _order(self, epoch: int) -> list[int]:
        return order_of_epoch(len(self._dataset), epoch, seed=self._seed, shuffle=self._shuffle)


def order_of_epoch(count: int, epoch: int, *, seed: int, shuffle: bool) -> list[int]:
    """In which order an epoch, from 0, takes `count` records: the same for the same seed, whatever came before."""
    indices = np.arange(count)
    if shuffle:
        np.random.default_rng((seed, epoch)).shuffle(indices)
    return indices.tolist()
