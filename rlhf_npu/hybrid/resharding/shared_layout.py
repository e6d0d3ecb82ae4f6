"""Which of the rollout's tensors can be the trainer's parameters themselves, and the storage in which they are.

What belongs together is seen in a rehearsal of vLLM's loading: a tensor of the rollout's that is one or several whole
parameters of the trainer's, one after the other and nothing else, needs no copy if these are neighbours in memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PreTrainedModel

from allocator import SleepPool
from rlhf_npu.engines.rollout import RolloutEngine
from rlhf_npu.engines.shared_storage import ALIGNMENT, SharedStorage
from rlhf_npu.errors import SharingError
from rlhf_npu.hybrid.resharding.load_trace import Write, storage_key
from rlhf_npu.hybrid.resharding.strided_copies import Place, StridedCopy, simple_copy
from rlhf_npu.hybrid.resharding.transfer_map import TransferMap, rehearse_loads

ZERO_ALIGNMENT = 2  # elements of each rank: DeepSpeed pads its flat buffer to a multiple of them


@dataclass(frozen=True)
class SharedLayout:
    """What is shared.

    Attributes:
        tensors: by the rollout's name of a parameter, the policy's names of those that it is made of, in their order.
        apart: the rollout's other parameters: why each must have memory of its own.
    """

    tensors: dict[str, tuple[str, ...]]
    apart: dict[str, str]


class WeightSharing:
    """Moves the parameters of a vLLM model that is being loaded into one storage with those that train.

    Attributes:
        layout: what is shared, and why the rest is not, once vLLM has loaded its model.

    Args:
        policy: the model that will be trained; it needs no weights.
        dtype: in which it will be trained.
        ranks: over which ZeRO will cut it.
        tag: of the sleep pool, for the storage.
    """

    def __init__(self, policy: PreTrainedModel, dtype: torch.dtype, ranks: int, tag: str) -> None:
        self._policy = policy
        self._dtype = dtype
        self._ranks = ranks
        self._tag = tag
        self._storage: SharedStorage | None = None
        self.layout = SharedLayout({}, {})

    def storage_of(self, rollout: RolloutEngine) -> SharedStorage | None:
        """What the rollout's parameters were laid out in; None where none of them can be shared.

        Raises:
            SharingError: vLLM has transformed parameters that were laid out, so that they are no trainer's any more.
        """
        storage = self._storage
        if storage is None:
            return None
        changed = [layer for layer in rollout.transformations.transformed if _is_within(layer, storage)]
        if changed:
            names = [name for name, layer in rollout.module.named_modules() if layer in changed]
            raise SharingError(
                f"vLLM transforms {', '.join(names)} after loading, which cannot be what trains: set "
                "hybrid.share_weights=off"
            )
        return storage

    @torch.no_grad()
    def lay_out(self, model: torch.nn.Module) -> None:
        """Make the storage, and let what can be shared of `model` live there; its contents stay.

        Raises:
            SharingError: vLLM keeps memory of a parameter beside the parameter itself.
        """
        self.layout = shared_layout(self._policy, model, self._dtype)
        if not self.layout.tensors:
            return
        trained = _trained_sizes(self._policy)
        starts, end = {}, 0
        for name in _in_order(trained, self.layout.tensors, self._dtype.itemsize):
            starts[name] = end
            end += trained[name]
        unit = ZERO_ALIGNMENT * self._ranks
        device = next(model.parameters()).device
        with SleepPool.get(device).region(self._tag):
            flat = torch.zeros(-(-end // unit) * unit, dtype=self._dtype, device=device)
        self._storage = SharedStorage(flat, starts, self.layout.tensors)
        for target, parts in self.layout.tensors.items():
            elements = sum(trained[name] for name in parts)
            _move(model, target, flat.narrow(0, starts[parts[0]], elements))


def shared_layout(policy: PreTrainedModel, model: torch.nn.Module, dtype: torch.dtype) -> SharedLayout:
    """What of vLLM's `model`, as it loads weights now, can be shared with a policy that trains in `dtype`."""
    parameters, loading = dict(model.named_parameters()), cast(Any, model)
    found = rehearse_loads(policy, loading.load_weights, parameters | dict(model.named_buffers()))
    trained = _trained_sizes(policy)
    written: dict[str, list[Write]] = defaultdict(list)
    targets: dict[str | None, set[str]] = defaultdict(set)
    for write in (write for writes in found.values() for write in writes or ()):
        written[write.target].append(write)
        targets[write.source].add(write.target)
    elsewhere = {source for source, names in targets.items() if len(names) > 1}
    tensors, apart = {}, {}
    for target, parameter in parameters.items():
        writes = sorted(written[target], key=lambda write: write.to.offset)
        reason = _no_room(parameter, dtype) or _not_whole(writes, parameter.numel(), trained, elsewhere)
        if reason:
            apart[target] = reason
        else:
            tensors[target] = tuple(str(write.source) for write in writes)
    return SharedLayout(tensors, apart)


def not_identical(mapped: TransferMap, storage: SharedStorage, rollout: torch.nn.Module) -> list[str]:
    """Names of the policy's weights that would not be copied to where they are, if what is shared were copied."""
    targets = dict(rollout.named_parameters())
    here = {name for name in storage.tensors if storage.holds(targets[name])}

    def is_identical(name: str) -> bool:
        (arrow, *others) = mapped.arrows.get(name, [None])
        if arrow is None or others or arrow.target not in here:
            return False
        elements = arrow.copy.source.numel
        return arrow.copy == StridedCopy(_run_of(elements, 0), _run_of(elements, storage.starts[name]))

    return sorted(name for name in storage.shared if not is_identical(name))


def _is_within(layer: torch.nn.Module, storage: SharedStorage) -> bool:
    return any(storage.holds(parameter) for parameter in layer.parameters(recurse=False))


def _trained_sizes(policy: torch.nn.Module) -> dict[str, int]:
    return {name: weight.numel() for name, weight in policy.named_parameters() if weight.requires_grad}


def _in_order(trained: Mapping[str, int], tensors: Mapping[str, tuple[str, ...]], item_bytes: int) -> list[str]:
    """The policy's order, but what is one tensor of the rollout's is put together, and what would shift others last."""
    together = {name: parts for parts in tensors.values() for name in parts}
    units = dict.fromkeys(together.get(name, (name,)) for name in trained)  # in their order, each once
    shifting = {unit for unit in units if sum(trained[name] for name in unit) * item_bytes % ALIGNMENT}
    return [name for unit in sorted(units, key=shifting.__contains__) for name in unit]


def _no_room(parameter: torch.Tensor, dtype: torch.dtype) -> str:
    """Why a tensor of the rollout's cannot be in the flat tensor, if so."""
    if parameter.dtype is not dtype:
        return f"it is {parameter.dtype}, and the trainer's weights are {dtype}"
    if parameter.nbytes % ALIGNMENT:
        return f"its {parameter.nbytes} bytes are no multiple of {ALIGNMENT}"
    if not parameter.is_contiguous() or parameter.untyped_storage().nbytes() != parameter.nbytes:
        return "vLLM has it in the memory of another tensor, or in another order"
    return ""


def _not_whole(writes: Sequence[Write], elements: int, trained: Mapping[str, int], elsewhere: Collection) -> str:
    """Why a tensor of so many elements is not several whole parameters, one after the other, if so."""
    at = 0
    for write in writes:
        if write.source is None:
            return f"vLLM fills {write.to.numel} of its {elements} elements itself"
        if not write.exact or write.taken is None:
            return f"vLLM computes it: {write.source}"
        if write.source not in trained:
            return f"{write.source} is not trained"
        whole = trained[write.source]
        if simple_copy(write.taken, write.to) != StridedCopy(_run_of(whole, 0), _run_of(whole, at)):
            return f"it has a part of {write.source}, or has it in another order"
        if write.source in elsewhere:
            return f"{write.source} is in other tensors too"
        at += whole
    return "" if at == elements else f"of its {elements} elements {elements - at} are not the trainer's"


def _run_of(elements: int, start: int) -> Place:
    return Place(start, (elements,), (1,))


def _move(model: torch.nn.Module, target: str, storage: torch.Tensor) -> None:
    """Let all of vLLM's parameters that have the target's memory be views of `storage`, which takes its contents."""
    parameters = [parameter for _, parameter in model.named_parameters(remove_duplicate=False)]
    memory = StorageWeakRef(model.get_parameter(target).untyped_storage())
    key = storage_key(model.get_parameter(target))
    storage.copy_(model.get_parameter(target).view(-1))
    for parameter in {id(one): one for one in parameters if storage_key(one) == key}.values():
        parameter.data = storage.view(parameter.shape)
    if not memory.expired():
        raise SharingError(f"vLLM keeps the memory of {target} beside the parameter, which is to be the trainer's")
