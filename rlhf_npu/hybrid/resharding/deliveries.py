"""Copies out of a bucket, of which all is known before but where the bucket is.

A reshard of a large model makes thousands of them, and making views takes the processor longer than the copies take the
device. So the target's view is made once, and bits are copied, and compared, as the widest integers that fit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlhf_npu.hybrid.resharding.bucket_transfer import Landing
from rlhf_npu.hybrid.resharding.proof import Comparison
from rlhf_npu.hybrid.resharding.strided_copies import Place, StridedCopy
from rlhf_npu.sleep_mode.tensor_bits import INTEGER_OF_WIDTH

WIDEST = 8  # bytes of an integer


@dataclass(frozen=True)
class Delivery:
    """One copy.

    Attributes:
        words: where it goes, and from which weight.
        source: in the bucket, whose bytes are read as `type`.
        target: what is written; of the same type where bits are copied.
    """

    words: str
    source: Place
    type: torch.dtype
    target: torch.Tensor

    def run(self, arrived: torch.Tensor, comparison: Comparison) -> None:
        """Copy out of a bucket, uint8 of (ranks, bytes), and let the outcome be compared with what arrived."""
        flat = arrived.view(-1).view(self.type)
        source = self.source.view_of(flat, arrived.storage_offset() // flat.element_size())
        self.target.copy_(source)
        compare = comparison.add_bits if self.type == self.target.dtype else comparison.add
        compare(self.words, self.target, source)


def delivery_of(landing: Landing, target: torch.Tensor, dtype: torch.dtype) -> Delivery:
    """The copy of a landing into the rollout's tensor `target`, out of a bucket of weights of `dtype`."""
    words, copy = landing.arrow.words(landing.name), landing.arrow.copy
    if dtype != target.dtype:
        return Delivery(words, copy.source, dtype, copy.target.view_of(target))
    copy, bits = _as_integers(copy, dtype.itemsize)
    room = torch.empty(0, dtype=bits, device=target.device)
    room.set_(target.untyped_storage(), copy.target.offset, copy.target.sizes, copy.target.strides)
    return Delivery(words, copy.source, bits, room)


def _as_integers(copy: StridedCopy, width: int) -> tuple[StridedCopy, torch.dtype]:
    """The copy in the widest integers that it moves whole, `width` being the bytes of an element, and their type."""
    units = WIDEST // width
    while units > 1:
        if (wide := copy.in_units(units)) is not None:
            return wide, INTEGER_OF_WIDTH[units * width]
        units //= 2
    return copy, INTEGER_OF_WIDTH[width]
