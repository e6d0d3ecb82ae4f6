"""The bit patterns of tensors as integers, and exact sums of them."""

from __future__ import annotations

import torch

INTEGER_OF_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
MODULUS = 1 << 64
CHUNK = 1 << 20  # elements; as int64 these are 8 MiB


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """The elements' bit patterns as integers of the same width, flat."""
    return tensor.detach().contiguous().view(-1).view(INTEGER_OF_WIDTH[tensor.element_size()])


def wide_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same bits as flat integers of eight bytes, fewer to read, where the tensor's memory allows it."""
    tensor = tensor.detach()
    start = tensor.storage_offset() * tensor.element_size()
    if tensor.is_contiguous() and tensor.nbytes % 8 == 0 and start % 8 == 0:
        return tensor.view(-1).view(torch.int64)
    return narrow_bits(tensor)


def narrow_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The elements' bit patterns as integers of the same width, in the tensor's shape; nothing is copied."""
    return tensor.detach().view(INTEGER_OF_WIDTH[tensor.element_size()])


def ordered_bits_sum(tensor: torch.Tensor) -> int:
    """Sum of the tensor's bits as integers, each times an odd number that its place decides, modulo 2**64.

    The integers are of eight bytes where they fill the tensor, so that a copy of it, wherever it is, has the same sum.
    """
    bits, total = _flat_bits(tensor), 0
    odd = torch.arange(1, 2 * min(CHUNK, bits.numel()) + 1, 2, device=bits.device)
    for start in range(0, bits.numel(), CHUNK):
        part = bits[start : start + CHUNK].to(torch.int64)
        total += int(((part * odd[: len(part)]).sum() + 2 * start * part.sum()).item())
    return total % MODULUS


def _flat_bits(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.nbytes % 8:
        return bits_of(tensor)
    bits = wide_bits(tensor.detach().contiguous())
    return (
        bits if bits.dtype == torch.int64 else wide_bits(tensor.detach().clone(memory_format=torch.contiguous_format))
    )
