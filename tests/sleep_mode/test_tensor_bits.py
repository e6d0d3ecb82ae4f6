"""Bit patterns are read as they are, and a sum of them sees what changed places."""

from __future__ import annotations

import pytest
import torch

from rlhf_npu.sleep_mode import tensor_bits
from rlhf_npu.sleep_mode.tensor_bits import ordered_bits_sum, wide_bits


@pytest.fixture
def tensor() -> torch.Tensor:
    return torch.randn(40, 33, generator=torch.Generator().manual_seed(0))


def test_wide_bits_are_the_tensors_own_bytes_wherever_they_begin(tensor: torch.Tensor) -> None:
    flat = tensor.bfloat16().view(-1)
    for view in (flat[:8], flat[4:16], flat[1:9], flat[:7], flat[::2], flat.view(40, 33).t()):
        bits = wide_bits(view)
        assert bits.untyped_storage().data_ptr() == view.untyped_storage().data_ptr()
        as_short = bits.reshape(-1).contiguous().view(torch.int16)
        assert torch.equal(as_short, view.contiguous().view(-1).view(torch.int16))
    assert wide_bits(flat[4:16]).dtype == torch.int64
    assert wide_bits(flat[1:9]).dtype == torch.int16


def test_the_ordered_sum_sees_what_changed_places_and_no_cut(
    tensor: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchanged = tensor.clone()
    exchanged[[0, 1]] = tensor[[1, 0]]
    whole = ordered_bits_sum(tensor)
    assert ordered_bits_sum(exchanged) != whole
    monkeypatch.setattr(tensor_bits, "CHUNK", 100)
    assert ordered_bits_sum(tensor) == whole
