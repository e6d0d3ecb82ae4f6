"""Is each element of a tensor written, and by one copy only?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from math import gcd

import torch

from rlhf_npu.engines.rollout import RolloutEngine
from rlhf_npu.hybrid.resharding.load_trace import Write, storage_key
from rlhf_npu.hybrid.resharding.strided_copies import Place
from rlhf_npu.hybrid.resharding.transfer_map import TransferMap
from rlhf_npu.hybrid.resharding.vllm_loading import VllmLoading

Places = dict[str, list[Place]]


def unaccounted(rollout: RolloutEngine, mapped: TransferMap, loaded: VllmLoading) -> list[str]:
    """The rollout's tensors that are not made of the trainer's weights, each element once, in words.

    What vLLM computed from other weights need not be.
    """
    written = _places(mapped, loaded.writes)
    device = next(rollout.module.parameters()).device
    transformed = set(rollout.transformations.transformed)
    problems = []
    seen: set[tuple[int, Place]] = set()
    for prefix, layer in rollout.module.named_modules():
        if layer in transformed:
            continue
        added = rollout.transformations.added.get(layer, ())
        for name, parameter in layer.named_parameters(prefix, recurse=False):
            memory = storage_key(parameter), Place.of(parameter)
            if memory in seen or name.rpartition(".")[2] in added:
                continue
            seen.add(memory)
            words = uncovered(*_alone(parameter, written.get(name, [])), device)
            problems += [f"{name}: {words}"] if words else []
    for name, elements in loaded.extents.items():
        whole = Place(0, (elements,), (1,))
        if words := uncovered(whole, elements, written.get(name, []), device):
            problems.append(f"{name}: {words}")
    return problems


def _alone(parameter: torch.Tensor, writes: Sequence[Place]) -> tuple[Place, int, list[Place]]:
    """Where a tensor and the writes to it are if its storage begins with it, and the elements that they reach."""
    mine = Place.of(parameter)
    moved = [replace(place, offset=place.offset - mine.offset) for place in (mine, *writes)]
    return moved[0], max(place.end for place in moved), moved[1:]


def _places(mapped: TransferMap, loaded: Sequence[Write]) -> Places:
    places: Places = defaultdict(list)
    for arrow in (arrow for arrows in mapped.arrows.values() for arrow in arrows):
        places[arrow.target].append(arrow.copy.target)
    for write in [*mapped.constants, *loaded]:
        places[write.target].append(write.to)
    return places


def uncovered(mine: Place, elements: int, writes: Sequence[Place], device: torch.device) -> str | None:
    """What is wrong with the writes to a tensor, in words; None if each element is written exactly once.

    Args:
        mine: where the tensor is in its storage.
        elements: of the storage.
        writes: places in the storage.
        device: where elements are counted: one byte for each run of them that all writes have whole.
    """
    run = gcd(elements, *(_run(place) for place in (mine, *writes)))
    counts = torch.zeros(elements // run, dtype=torch.uint8, device=device)
    for place in writes:
        _in_runs(place, run).view_of(counts).add_(1)
    written = _in_runs(mine, run).view_of(counts)
    missing, again = int((written == 0).sum().item()), int((written > 1).sum().item())
    if not missing and not again:
        return None
    return f"of {mine.numel} elements {missing * run} are not written, {again * run} more than once"


def _run(place: Place) -> int:
    """How many elements beside each other the place has, or has not, always together."""
    others = [stride for stride in place.strides if stride != 1]
    lengths = [size for size, stride in zip(place.sizes, place.strides, strict=True) if stride == 1]
    return gcd(place.offset, *others, *lengths) if lengths else 1


def _in_runs(place: Place, run: int) -> Place:
    sizes = [size // run if stride == 1 else size for size, stride in zip(place.sizes, place.strides, strict=True)]
    strides = [1 if stride == 1 else stride // run for stride in place.strides]
    return Place(place.offset // run, tuple(sizes), tuple(strides))
