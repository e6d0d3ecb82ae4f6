"""Batches whose responses differ in length, as the tests here need them."""

from __future__ import annotations

import torch
from torch import Tensor


def random_batch(seed: int, batch: int, width: int) -> tuple[Tensor, Tensor]:
    """Float64 values (B, T) and a mask of responses of random length, empty ones included.

    What stands beyond a response is NaN: whatever reads it, shows.
    """
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(batch, width, generator=generator, dtype=torch.float64)
    lengths = torch.randint(0, width + 1, (batch,), generator=generator)
    lengths[0] = width
    mask = (torch.arange(width) < lengths[:, None]).float()
    return values.masked_fill(mask == 0, torch.nan), mask


def normal(seed: int, *shape: int) -> Tensor:
    """Float64 numbers from the standard normal distribution."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def holed_batch(seed: int, batch: int, width: int) -> tuple[Tensor, Tensor]:
    """As `random_batch`, with holes inside of responses, as tools' answers leave them."""
    values, mask = random_batch(seed, batch, width)
    generator = torch.Generator().manual_seed(seed + 1)
    mask = mask * (torch.rand(batch, width, generator=generator) < 0.7)
    mask[0, 0] = 1
    return values.nan_to_num().masked_fill(mask == 0, torch.nan), mask
