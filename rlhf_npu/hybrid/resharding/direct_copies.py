"""The weights that are copied straight from the trainer's tensors to the rollout's, and compared bit by bit."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from rlhf_npu.engines.rollout import RolloutEngine
from rlhf_npu.hybrid.resharding.bucket_transfer import BucketTransfer
from rlhf_npu.hybrid.resharding.deliveries import Delivery, delivery_of
from rlhf_npu.hybrid.resharding.gathered import gathered_buckets, is_partitioned, saved_buffers
from rlhf_npu.hybrid.resharding.proof import Comparison
from rlhf_npu.hybrid.resharding.transfer_map import Arrow, TransferMap, named_tensors


class DirectCopies:
    """Copies along a map's arrows: out of whole weights as they are, out of ZeRO-3's shards through buckets.

    Args:
        shared: the trainer's names of weights that the rollout has already, since both have one memory of them.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        rollout: RolloutEngine,
        mapped: TransferMap,
        bucket_bytes: int,
        shared: Collection[str] = (),
    ) -> None:
        self._policy = policy
        self._rollout = rollout
        self._map = mapped
        self._bucket_bytes = bucket_bytes
        weights: dict[str, Any] = dict([*saved_buffers(policy), *policy.named_parameters()])
        self._copied = [name for name in mapped.arrows if name not in shared]
        self._whole = [name for name in self._copied if not is_partitioned(weights[name])]
        shards = {name: weights[name] for name in self._copied if is_partitioned(weights[name])}
        self._transfer = BucketTransfer(shards, mapped.arrows, bucket_bytes) if shards else None
        self._places: dict[str, tuple[int, torch.dtype]] = {}
        self._made: list[list[Delivery]] = []

    @property
    def buckets(self) -> int:
        """Collectives of a run."""
        return len(self._transfer.buckets) if self._transfer else 0

    def run(self, comparison: Comparison) -> list[str]:
        """Copy all; what the rollout then holds is compared with what was at hand.

        Returns:
            what arrived otherwise than it was sent, in words.
        """
        targets = named_tensors(self._rollout.module)

        def copy(name: str, arrow: Arrow, source: torch.Tensor) -> None:
            target = _target(targets, arrow)
            target.copy_(source)
            comparison.add(arrow.words(name), target, source)

        for write in self._map.constants:
            write.to.view_of(targets[write.target].data).fill_(write.value)
        weights = dict(self._policy.named_parameters()) | dict(self._policy.named_buffers())
        for name in self._whole:
            for arrow, source in self._sources(name, weights[name]):
                copy(name, arrow, source)
        if self._transfer is None:
            return []
        deliveries = self._deliveries(self._transfer, targets, weights)

        def arrive(bucket: int, arrived: torch.Tensor) -> None:
            for delivery in deliveries[bucket]:
                delivery.run(arrived, comparison)

        sent, seen = self._transfer.run(arrive)
        return [f"what rank {rank} sent in bucket {bucket}" for bucket, rank in (sent != seen).nonzero().tolist()]

    def compare(self, comparison: Comparison) -> None:
        """Compare what the rollout holds with the trainer's weights, which DeepSpeed gathers for it."""
        targets = named_tensors(self._rollout.module)
        for bucket in gathered_buckets(self._policy, self._bucket_bytes, only=self._copied):
            for name, weight in bucket:
                for arrow, source in self._sources(name, weight):
                    comparison.add(arrow.words(name), _target(targets, arrow), source)
        for write in self._map.constants:
            held = write.to.view_of(targets[write.target].data)
            comparison.add(f"the padding of {write.target}", held, torch.full_like(held, write.value))

    def _deliveries(
        self, transfer: BucketTransfer, targets: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]
    ) -> list[list[Delivery]]:
        """Of each bucket; made once, for as long as the rollout's tensors stay where they are."""
        places = {name: (target.data_ptr(), target.dtype) for name, target in targets.items()}
        if places != self._places:
            self._places = places
            self._made = [
                [
                    delivery_of(landing, targets[landing.arrow.target].data, weights[landing.name].dtype)
                    for landing in bucket.landings
                ]
                for bucket in transfer.buckets
            ]
        return self._made

    def _sources(self, name: str, weight: torch.Tensor) -> Iterator[tuple[Arrow, torch.Tensor]]:
        flat = weight.detach().contiguous()
        for arrow in self._map.arrows[name]:
            yield arrow, arrow.copy.source.view_of(flat, int(flat.storage_offset()))


def _target(targets: dict[str, torch.Tensor], arrow: Arrow) -> torch.Tensor:
    return arrow.copy.target.view_of(targets[arrow.target].data)
