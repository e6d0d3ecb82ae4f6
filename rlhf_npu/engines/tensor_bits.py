"""Sums over the bit patterns of tensors: exact, and the same however the work is cut."""

from __future__ import annotations

import torch

INTEGER_OF_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
MODULUS = 1 << 64
CHUNK = 1 << 22  # elements; as int64 these are 32 MiB
_ODD = 0x9E3779B97F4A7C15 - MODULUS  # 2**64 over the golden ratio, as a signed number


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """The elements' bit patterns as integers of the same width, flat."""
    return tensor.detach().contiguous().view(-1).view(INTEGER_OF_WIDTH[tensor.element_size()])


def bits_sum(tensor: torch.Tensor) -> int:
    """Sum of the elements' bit patterns, modulo 2**64; blind to their order.

    A bfloat16 counts as the float32 of the same value, whose upper half it is.
    """
    scale = 1 << 16 if tensor.dtype is torch.bfloat16 else 1
    return int(bits_of(tensor).sum(dtype=torch.int64).item()) * scale % MODULUS


def ordered_bits_sum(tensor: torch.Tensor) -> int:
    """Sum of the elements' bit patterns, each times a number that its place decides, modulo 2**64."""
    bits, total = bits_of(tensor), 0
    for start in range(0, bits.numel(), CHUNK):
        part = bits[start : start + CHUNK].to(torch.int64)
        places = torch.arange(start + 1, start + 1 + len(part), device=part.device)
        total += int((part * (places * _ODD)).sum().item())
    return total % MODULUS
