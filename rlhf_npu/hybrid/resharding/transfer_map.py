"""Which copies make the rollout's weights out of the trainer's: found once, by a rehearsal of vLLM's loading.

The rehearsal gives vLLM tensors without elements, so nothing is gathered, moved or allocated for it. Weights whose way
cannot be told so (vLLM computes with them, or transforms the layer that they belong to) are left to vLLM's own loading.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from rlhf_npu.engines.collectives import MAX, all_reduce
from rlhf_npu.engines.rollout import RolloutEngine
from rlhf_npu.errors import ReshardError
from rlhf_npu.hybrid.resharding.checkpoint_names import Named, as_in_checkpoint
from rlhf_npu.hybrid.resharding.gathered import saved_buffers, shape_of
from rlhf_npu.hybrid.resharding.load_trace import LoadWatch, TensorNames, Write, nothing_moves, storage_key
from rlhf_npu.hybrid.resharding.strided_copies import StridedCopy, simple_copy
from rlhf_npu.sleep_mode.weight_update import own_tensors

Load = Callable[[Named], Any]
# What vLLM's loaders raise at a weight that has no elements, or that is not one for their layer as it is now.
UNTRACEABLE = (AssertionError, AttributeError, KeyError, TypeError, ValueError, RuntimeError, NotImplementedError)


@dataclass(frozen=True)
class Arrow:
    """A copy into the rollout's tensor of that name."""

    target: str
    copy: StridedCopy

    def words(self, name: str) -> str:
        """Where it goes, and that it comes from the weight called `name`."""
        return f"{self.target} (from {name})"


@dataclass(frozen=True)
class TransferMap:
    """How each of the trainer's weights reaches the rollout; the names are the same on all ranks.

    Attributes:
        arrows: by the trainer's name, what is copied directly; nothing where none of it is this rank's.
        constants: what vLLM fills with a number beside (the padding of a vocabulary).
        by_vllm: the names of weights that are loaded by vLLM's own code each time, in the policy's order.
    """

    arrows: dict[str, list[Arrow]]
    constants: list[Write]
    by_vllm: list[str]


def named_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers of a model."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def map_transfer(policy: PreTrainedModel, rollout: RolloutEngine) -> TransferMap:
    """Rehearse `load_weights` weight by weight; every rank calls this together.

    Raises:
        ReshardError: `load_weights` gives the rollout's tensors new memory: captured graphs would keep the old weights.
    """
    tensors = named_tensors(rollout.module)
    transformed = {
        storage_key(own) for layer in rollout.transformations.transformed for own in own_tensors(layer).values()
    }
    untouchable = {name for name, tensor in tensors.items() if storage_key(tensor) in transformed}
    found = rehearse_loads(policy, rollout.load_weights, tensors)
    arrows = {name: _arrows(writes, untouchable) for name, writes in found.items()}
    by_vllm = _agreed(arrows, next(iter(tensors.values())).device)
    constants = [
        write for name, writes in found.items() if name not in by_vllm for write in writes or () if write.source is None
    ]
    mapped = {name: copies for name, copies in arrows.items() if copies is not None and name not in by_vllm}
    return TransferMap(mapped, constants, by_vllm)


def rehearse_loads(
    policy: PreTrainedModel, load_weights: Load, tensors: Mapping[str, torch.Tensor]
) -> dict[str, list[Write] | None]:
    """What vLLM writes when it is given each of the policy's weights alone; None where that cannot be told.

    Args:
        policy: may be on the meta device.
        tensors: the rollout's, by name; writes to others are not seen.

    Raises:
        ReshardError: `load_weights` gives the rollout's tensors new memory: captured graphs would keep the old weights.
    """
    names = TensorNames(tensors.items())
    found: dict[str, list[Write] | None] = {}
    with nothing_moves(tensors) as moved:
        for name, weight in [*saved_buffers(policy), *policy.named_parameters()]:
            found[name] = _rehearse(policy, load_weights, name, weight, names)
    if moved:
        raise ReshardError(f"vLLM's load_weights gives new memory to {', '.join(moved)}")
    return found


def _agreed(arrows: dict[str, list[Arrow] | None], device: torch.device) -> list[str]:
    """The weights whose way cannot be told on some rank, or that go nowhere on all ranks, which call this together."""
    unclear = torch.tensor([copies is None for copies in arrows.values()], dtype=torch.int32, device=device)
    used = torch.tensor([bool(copies) for copies in arrows.values()], dtype=torch.int32, device=device)
    if dist.is_initialized():
        unclear, used = all_reduce(unclear, MAX), all_reduce(used, MAX)
    left = (unclear + (1 - used)).tolist()
    return [name for name, one in zip(arrows, left, strict=True) if one]


def _rehearse(
    policy: PreTrainedModel, load_weights: Load, name: str, weight: torch.Tensor, names: TensorNames
) -> list[Write] | None:
    """What vLLM writes on this rank when it is given one weight; None where that cannot be told."""
    empty = torch.empty(shape_of(weight), dtype=weight.dtype, device="meta")
    watch = LoadWatch(names, runs=False)
    watch.give(name, empty)
    try:
        with torch.no_grad(), watch:
            load_weights(as_in_checkpoint(policy, [(name, empty)]))
    except UNTRACEABLE:
        return None
    return watch.writes


def _arrows(writes: list[Write] | None, untouchable: set[str]) -> list[Arrow] | None:
    """The writes as copies; None if one of them is something else."""
    if writes is None:
        return None
    arrows = []
    for write in writes:
        if not write.exact or write.target in untouchable:
            return None
        if write.taken is not None:
            copy = simple_copy(write.taken, write.to)
            if copy is None:
                return None
            arrows.append(Arrow(write.target, copy))
    return arrows
