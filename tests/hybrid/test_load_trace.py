"""What is seen of a load does not depend on where the trainer's tensors are in their storages."""

from __future__ import annotations

import torch

from rlhf_npu.hybrid.resharding.load_trace import LoadWatch, Write, storage_key


def writes_of(offset: int) -> list[Write]:
    """A weight that begins at `offset` of its storage is copied as it is, and its rows exchanged."""
    weight = torch.arange(64.0)[offset : offset + 8].view(2, 4)
    target = torch.zeros(4, 4)
    watch = LoadWatch(lambda tensor: "target" if storage_key(tensor) == storage_key(target) else None, runs=True)
    watch.give("weight", weight)
    with watch:
        target[:2].copy_(weight)
        target[2:].copy_(weight[:, :3].sum(1, keepdim=True).expand(2, 4))
    assert torch.equal(target[:2], weight)
    return watch.writes


def test_a_gathered_weight_may_be_anywhere_in_deepspeeds_buffer() -> None:
    copied, computed = writes_of(0)
    assert (copied.exact, computed.exact) == (True, False)
    assert "weight by aten.sum" in str(computed.source)
    assert writes_of(24) == [copied, computed]
