"""Which rank trains on which examples of a batch, and in which micro-batches."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_npu.data.packing import cut

Plan = list[list[int]]


def deal(indices: Sequence[int], tokens: Sequence[int], ranks: int, max_tokens: int) -> list[Plan]:
    """Deal examples out so that all ranks have as many of them, about as many tokens, and as many micro-batches.

    Args:
        indices: of the examples, a multiple of `ranks`.
        tokens: of each of them, packed.
        max_tokens: of a micro-batch.

    Returns:
        for each rank its micro-batches, each a list of `indices`.
    """
    shares = _shares(tokens, ranks)
    sizes = [[tokens[place] for place in share] for share in shares]
    most = max(len(cut(size, max_tokens)) for size in sizes)
    return [
        [[indices[share[place]] for place in part] for part in cut(size, max_tokens, most)]
        for share, size in zip(shares, sizes, strict=True)
    ]


def _shares(tokens: Sequence[int], ranks: int) -> list[list[int]]:
    """Places, longest first, dealt back and forth: no rank is a whole example ahead in each round."""
    order = sorted(range(len(tokens)), key=lambda place: (-tokens[place], place))
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for first in range(0, len(order), ranks):
        there = order[first : first + ranks]
        for rank, place in enumerate(there if first // ranks % 2 == 0 else reversed(there)):
            shares[rank].append(place)
    return shares
