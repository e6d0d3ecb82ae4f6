"""Move the trained weights into the rollout engine, and prove that they arrived."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from rlhf_npu.engines.collectives import MAX, all_reduce
from rlhf_npu.engines.rollout import RolloutEngine
from rlhf_npu.engines.shared_storage import SharedStorage
from rlhf_npu.errors import ReshardError, SharingError
from rlhf_npu.hybrid.resharding.checkpoint_names import check_convertible
from rlhf_npu.hybrid.resharding.coverage import unaccounted
from rlhf_npu.hybrid.resharding.direct_copies import DirectCopies
from rlhf_npu.hybrid.resharding.gathered import saved_buffers, shape_of
from rlhf_npu.hybrid.resharding.proof import Comparison, changed, in_words
from rlhf_npu.hybrid.resharding.shared_layout import not_identical
from rlhf_npu.hybrid.resharding.transfer_map import UNTRACEABLE, TransferMap, map_transfer
from rlhf_npu.hybrid.resharding.vllm_loading import VllmLoading


@dataclass(frozen=True)
class ReshardReport:
    """One reshard.

    Attributes:
        version: of the weights that the rollout now has.
        moved_bytes: of the trainer's whole weights, but for those that the rollout shares.
        buckets: collectives that gathered them; none where each rank has them whole.
    """

    version: int
    moved_bytes: int
    buckets: int


class Resharder:
    """Loads a trainer's parameters into the rollout engine of the same process.

    Where ZeRO-3 has cut them, two buckets live beside the two models during a reshard, otherwise nothing; where vLLM
    transforms weights, one bucket and one layer.

    Args:
        storage: what trainer and rollout both compute with; of its weights nothing moves.

    Raises:
        ModelError: the policy's weights cannot be sent bucket by bucket.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        rollout: RolloutEngine,
        bucket_bytes: int,
        storage: SharedStorage | None = None,
    ) -> None:
        check_convertible(policy)
        self._storage = storage
        self._shared = storage.shared if storage else frozenset[str]()
        self._policy = policy
        self._rollout = rollout
        self._bucket_bytes = bucket_bytes
        self._is_accounted_for = False
        self.version = 0

    def reshard(self, version: int | None = None) -> ReshardReport:
        """Overwrite the rollout's weights in place, whatever they hold; every rank calls this together.

        Args:
            version: of the policy's weights; the next one if None.

        Raises:
            ReshardError: the rollout's weights are not the trainer's afterwards; names them.
            SharingError: vLLM does not load what is shared to where it is.
        """
        report = self._transfer(self.version + 1 if version is None else version)
        self.version = report.version
        return report

    def rehearse(self) -> None:
        """Reshard the weights that both engines began with: what will fail is to fail before anything was trained.

        The rollout's own weights are zero before it, so that one that does not arrive cannot be taken for one that did.

        Raises:
            ReshardError: vLLM does not take all of them while it runs.
            torch.OutOfMemoryError: there was no memory for it.
        """
        for parameter in self._rollout.module.parameters():
            if self._storage is None or not self._storage.holds(parameter):
                parameter.data.zero_()
        try:
            self._transfer(self.version)
        except (torch.OutOfMemoryError, SharingError):  # RuntimeErrors that say nothing of the model
            raise
        except UNTRACEABLE as error:
            raise ReshardError(
                f"models of type {self._policy.config.model_type!r} cannot be trained here: vLLM does not take new "
                f"weights of theirs while it runs ({type(error).__name__}: {error})"
            ) from error
        self.verify()

    @torch.no_grad()
    def verify(self) -> None:
        """Prove that the rollout holds the weights of the trainer, which DeepSpeed gathers for it; nothing is changed.

        Every rank calls this together, with the weights of both awake.

        Raises:
            ReshardError: it does not; names the tensors.
        """
        comparison = Comparison()
        self._direct.compare(comparison)
        problems = self._strays() + comparison.differing() + self._by_vllm.changed()
        self._judge(self.version, problems + self._lost_buffers())

    @torch.no_grad()
    def _transfer(self, version: int) -> ReshardReport:
        with self._rollout.receiving_weights():
            comparison = Comparison()
            problems = self._strays() + self._direct.run(comparison) + comparison.differing()
            if self._by_vllm.is_needed:
                problems += self._by_vllm.load(self._bucket_bytes)
            if not self._is_accounted_for:
                problems += unaccounted(self._rollout, self._map, self._by_vllm) + self._not_taken()
            self._judge(version, problems + self._lost_buffers())
        self._is_accounted_for = True
        return ReshardReport(version, self._bytes, self._direct.buckets)

    @cached_property
    def _map(self) -> TransferMap:
        mapped = map_transfer(self._policy, self._rollout)
        if self._storage and (others := not_identical(mapped, self._storage, self._rollout.module)):
            raise SharingError(f"vLLM loads weights elsewhere than to where they are shared: {in_words(others)}")
        return mapped

    @cached_property
    def _direct(self) -> DirectCopies:
        return DirectCopies(self._policy, self._rollout, self._map, self._bucket_bytes, self._shared)

    @cached_property
    def _by_vllm(self) -> VllmLoading:
        return VllmLoading(self._policy, self._rollout, self._map.by_vllm)

    @cached_property
    def _bytes(self) -> int:
        weights = [*saved_buffers(self._policy), *self._policy.named_parameters()]
        return sum(
            shape_of(weight).numel() * weight.element_size() for name, weight in weights if name not in self._shared
        )

    def _strays(self) -> list[str]:
        if self._storage is None:
            return []
        trainers = self._storage.strays_of_policy(self._policy)
        rollouts = self._storage.strays_of_rollout(self._rollout.module)
        return [f"the trainer's {name} has left the storage that it shares with the rollout" for name in trainers] + [
            f"{name} has left the storage that it shares with the trainer" for name in rollouts
        ]

    def _lost_buffers(self) -> list[str]:
        """Buffers that no checkpoint has, and that do not hold what they held when the model was loaded."""
        buffers = dict(self._rollout.module.named_buffers())
        written = {arrow.target for arrows in self._map.arrows.values() for arrow in arrows}
        written |= {write.target for write in self._by_vllm.writes}
        sums = {name: total for name, total in self._rollout.transformations.buffers.items() if name not in written}
        return [f"{name} (a buffer) is not what it was when vLLM loaded the model" for name in changed(buffers, sums)]

    def _not_taken(self) -> list[str]:
        """Weights of the trainer's that vLLM takes on no rank."""
        names = self._map.by_vllm
        if not names:
            return []
        taken = torch.tensor([name in self._by_vllm.taken for name in names], dtype=torch.int32)
        if dist.is_initialized():
            taken = all_reduce(taken.to(self._rollout_device), MAX)
        return [f"vLLM takes nothing of {name}" for name, one in zip(names, taken.tolist(), strict=True) if not one]

    def _judge(self, version: int, problems: list[str]) -> None:
        """All ranks end together.

        Raises:
            ReshardError: there are problems on some rank.
        """
        found = torch.tensor(len(problems), dtype=torch.int32)
        if dist.is_initialized():
            found = all_reduce(found.to(self._rollout_device), MAX)
        if not found.item():
            return
        raise ReshardError(
            f"reshard to version {version}: the rollout engine does not hold the trainer's weights, its generations "
            f"would be stale: {in_words(problems) or 'other ranks say which'}"
        )

    @property
    def _rollout_device(self) -> torch.device:
        return next(iter(self._rollout.module.parameters())).device
