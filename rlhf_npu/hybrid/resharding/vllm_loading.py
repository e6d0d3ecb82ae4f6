"""Weights that vLLM's own code loads each time: it computes with them, or transforms the layers that they belong to.

Each load is watched. What it writes where must be what the first one wrote, of which each element was accounted for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PreTrainedModel

from rlhf_npu.engines.rollout import RolloutEngine
from rlhf_npu.hybrid.resharding.checkpoint_names import as_in_checkpoint
from rlhf_npu.hybrid.resharding.gathered import gathered_buckets
from rlhf_npu.hybrid.resharding.load_trace import LoadWatch, Write, storage_key
from rlhf_npu.hybrid.resharding.proof import changed, made_by_vllm
from rlhf_npu.hybrid.resharding.transfer_map import named_tensors
from rlhf_npu.sleep_mode.weight_update import Tensors, own_tensors, sums_of


class VllmLoading:
    """Loads the weights called `names`, through vLLM.

    Attributes:
        writes: what the first load wrote.
        extents: elements of the storage of each tensor that was written.
        taken: the weights from which anything was written.
    """

    def __init__(self, policy: PreTrainedModel, rollout: RolloutEngine, names: Sequence[str]) -> None:
        self._policy = policy
        self._rollout = rollout
        self._names = names
        self._found: dict[int, tuple[StorageWeakRef, str | None]] = {}
        self._sums: dict[str, int] = {}
        self.writes: list[Write] = []
        self.extents: dict[str, int] = {}
        self.taken: set[str] = set()

    @property
    def is_needed(self) -> bool:
        """Whether vLLM has anything to do."""
        seen = self._rollout.transformations
        return bool(self._names or seen.transformed or seen.derived)

    def load(self, bucket_bytes: int) -> list[str]:
        """Load all of them; every rank calls this together.

        Returns:
            tensors that were written in another way than at first.
        """
        watch = LoadWatch(self._target_of, runs=True)
        self._found.clear()
        with ExitStack() as stack:
            stack.enter_context(self._rollout.updating_weights())
            for bucket in gathered_buckets(self._policy, bucket_bytes, only=self._names):
                for name, tensor in bucket:
                    watch.give(name, tensor)
                with watch:
                    self._rollout.load_weights(as_in_checkpoint(self._policy, bucket))
            with watch:  # layers with padding are loaded, and transformed, at the end
                stack.close()
        self._sums = sums_of(self._outcome(watch.writes))
        if not self.writes:
            self.writes, self.taken = watch.writes, watch.taken
        return _differences(self.writes, watch.writes)

    def changed(self) -> list[str]:
        """The names of tensors that do not hold what the last load left in them."""
        return changed(self._outcome(self.writes), self._sums)

    def _outcome(self, writes: Sequence[Write]) -> Tensors:
        tensors = named_tensors(self._rollout.module)
        written = {write.target for write in writes}
        return made_by_vllm(self._rollout) | {name: tensors[name] for name in sorted(written & tensors.keys())}

    def _target_of(self, tensor: torch.Tensor) -> str | None:
        key = storage_key(tensor)
        if key not in self._found:
            storage = tensor.untyped_storage()
            name = self._search(key)
            self._found[key] = (StorageWeakRef(storage), name)
            if name is not None:
                self.extents[name] = storage.nbytes() // tensor.element_size()
        return self._found[key][1]

    def _search(self, key: int) -> str | None:
        """Layers that are loaded anew have new tensors each time."""
        for prefix, layer in self._layers:
            for name, own in own_tensors(layer).items():
                if storage_key(own) == key:
                    return f"{prefix}.{name}" if prefix else name
        return None

    @cached_property
    def _layers(self) -> list[tuple[str, torch.nn.Module]]:
        return [(prefix, layer) for prefix, layer in self._rollout.module.named_modules() if _owns(layer)]


def _owns(layer: torch.nn.Module) -> bool:
    return bool(layer._parameters or layer._buffers)  # noqa: SLF001


def _differences(first: Sequence[Write], now: Sequence[Write]) -> list[str]:
    if first == now:
        return []
    before, after = Counter(first), Counter(now)
    names = {write.target: write.source for write in [*(before - after), *(after - before)]}
    return [f"{target} (from {source}) is loaded in another way than at first" for target, source in names.items()]
