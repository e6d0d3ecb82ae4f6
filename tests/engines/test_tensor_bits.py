"""Sums over bit patterns: what they count, and what they are blind to."""

from __future__ import annotations

import pytest
import torch

from rlhf_npu.engines import tensor_bits
from rlhf_npu.engines.tensor_bits import MODULUS, bits_sum, ordered_bits_sum


@pytest.fixture
def tensor() -> torch.Tensor:
    return torch.randn(40, 33, generator=torch.Generator().manual_seed(0))


def test_a_bfloat16_counts_as_the_float32_of_the_same_value(tensor: torch.Tensor) -> None:
    rounded = tensor.bfloat16()
    assert bits_sum(rounded) == bits_sum(rounded.float())
    assert bits_sum(rounded) != bits_sum(tensor)


def test_the_sum_of_parts_is_that_of_the_whole_in_any_order(tensor: torch.Tensor) -> None:
    parts = tensor.t().chunk(3)
    assert sum(map(bits_sum, parts)) % MODULUS == bits_sum(tensor)


def test_the_ordered_sum_sees_what_changed_places_and_no_cut(
    tensor: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchanged = tensor.clone()
    exchanged[[0, 1]] = tensor[[1, 0]]
    whole = ordered_bits_sum(tensor)
    assert bits_sum(exchanged) == bits_sum(tensor)
    assert ordered_bits_sum(exchanged) != whole
    monkeypatch.setattr(tensor_bits, "CHUNK", 100)
    assert ordered_bits_sum(tensor) == whole
