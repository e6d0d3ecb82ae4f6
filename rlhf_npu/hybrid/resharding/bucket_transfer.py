"""ZeRO-3 shards to the rollout's weights: two buckets, one collective a bucket, copies beside the next collective.

Each bucket holds pieces of the ranks' shards: of each weight in it the same range of every rank's flat shard. Which
copies read these pieces is found once; later reshards only gather and copy. The collective of the next bucket is queued
before the copies out of this one, into the memory that the bucket before left, so both run at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from rlhf_npu.hybrid.resharding.strided_copies import StridedCopy
from rlhf_npu.hybrid.resharding.transfer_map import Arrow

ALIGNMENT = 16  # bytes
_all_gather: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # the name that torch 2.13 gave it
Arrival = Callable[[int, torch.Tensor], None]  # copies out of the bucket of that number, uint8 of (ranks, bytes)


@dataclass(frozen=True)
class Piece:
    """Elements `start` to `start + length` of every rank's shard of a weight, `at` bytes into the rank's region."""

    name: str
    start: int
    length: int
    at: int


@dataclass(frozen=True)
class Landing:
    """A copy out of a bucket: `arrow.copy.source` counts elements of the weight's type from the bucket's start."""

    name: str
    arrow: Arrow


@dataclass(frozen=True)
class Bucket:
    """Pieces that one collective gathers, and the copies out of it."""

    pieces: list[Piece]
    landings: list[Landing]


class BucketTransfer:
    """Gathers a policy's shards bucket by bucket.

    Args:
        parameters: those of the policy that ZeRO-3 has partitioned, by name.
        arrows: where their elements go.
        bucket_bytes: of one bucket, with the pieces that this rank sends.
    """

    def __init__(
        self, parameters: Mapping[str, torch.nn.Parameter], arrows: Mapping[str, Sequence[Arrow]], bucket_bytes: int
    ) -> None:
        self._parameters: Mapping[str, Any] = parameters
        first: Any = next(iter(parameters.values()))
        self._group = first.ds_process_group
        self._ranks = dist.get_world_size(self._group)
        self._region = max(ALIGNMENT, bucket_bytes // (self._ranks + 1) // ALIGNMENT * ALIGNMENT)
        self.buckets = [self._bucket(pieces, arrows) for pieces in self._cut()]

    def run(self, arrive: Arrival) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather each bucket and let `arrive` copy out of it; every rank calls this together.

        Returns:
            sums (buckets, ranks) of the bits that each rank sent, as it counted them, and of those that are in this
            rank's buckets after the copies.
        """
        device = next(iter(self._parameters.values())).ds_tensor.device
        memory = torch.zeros(2, self._ranks + 1, self._region, dtype=torch.uint8, device=device)
        sent, seen = [], []
        work = self._start(0, memory)
        for index in range(len(self.buckets)):
            mine, arrived = memory[index % 2, 0], memory[index % 2, 1:]
            following = self._start(index + 1, memory) if index + 1 < len(self.buckets) else None
            work.wait()
            work = following
            arrive(index, arrived)
            sent.append(_bits(mine[None]))
            seen.append(_bits(arrived))
        return self._from_all(torch.cat(sent)), torch.stack(seen)

    def _start(self, index: int, memory: torch.Tensor) -> Any:
        mine, arriving = memory[index % 2, 0], memory[index % 2, 1:]
        for piece in self.buckets[index].pieces:
            shard = self._parameters[piece.name].ds_tensor.detach().view(-1)
            room = mine[piece.at : piece.at + piece.length * shard.element_size()]
            room.view(shard.dtype).copy_(shard[piece.start : piece.start + piece.length])
        return _all_gather(arriving.view(-1), mine, group=self._group, async_op=True)

    def _from_all(self, sums: torch.Tensor) -> torch.Tensor:
        of_ranks = [torch.empty_like(sums) for _ in range(self._ranks)]
        dist.all_gather(of_ranks, sums, group=self._group)
        return torch.stack(of_ranks, dim=1)

    def _cut(self) -> Iterator[list[Piece]]:
        pieces: list[Piece] = []
        used = 0
        for name, parameter in self._parameters.items():
            width, left = parameter.element_size(), self._shard(name)
            while left:
                if (room := (self._region - used) // width) == 0:
                    yield pieces
                    pieces, used = [], 0
                    continue
                length = min(left, room)
                pieces.append(Piece(name, self._shard(name) - left, length, used))
                used += -(-length * width // ALIGNMENT) * ALIGNMENT
                left -= length
        if pieces:
            yield pieces

    def _shard(self, name: str) -> int:
        """Elements of each rank's shard, with its padding."""
        return int(self._parameters[name].ds_tensor.numel())

    def _bucket(self, pieces: list[Piece], arrows: Mapping[str, Sequence[Arrow]]) -> Bucket:
        landings = [
            Landing(piece.name, Arrow(arrow.target, landed))
            for piece in pieces
            for rank in range(self._ranks)
            for arrow in arrows[piece.name]
            for landed in self._landed(piece, rank, arrow.copy)
        ]
        return Bucket(pieces, landings)

    def _landed(self, piece: Piece, rank: int, copy: StridedCopy) -> list[StridedCopy]:
        parameter = self._parameters[piece.name]
        first = rank * self._shard(piece.name) + piece.start
        start = (rank * self._region + piece.at) // parameter.element_size()
        stop = min(first + piece.length, parameter.ds_numel)
        return [part.from_source(start - first) for part in copy.within(first, stop)] if first < stop else []


def _bits(regions: torch.Tensor) -> torch.Tensor:
    """The sum of each region's bytes, eight as one integer, modulo 2**64."""
    return regions.view(torch.int64).sum(dim=1)
