"""Does the rollout hold the trainer's weights? By bits where they were copied, by sums of bits where vLLM made them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from rlhf_npu.engines.rollout import RolloutEngine
from rlhf_npu.sleep_mode.tensor_bits import narrow_bits, wide_bits
from rlhf_npu.sleep_mode.weight_update import Tensors, own_tensors, sums_of

NAMED = 8  # problems that an error spells out


class Comparison:
    """Compares views bit by bit; the device is waited for once, at the end."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._same: list[torch.Tensor] = []

    def add(self, name: str, held: torch.Tensor, expected: torch.Tensor) -> None:
        """`held` is to have the bits of `expected`, rounded to its type."""
        self._names.append(name)
        self._same.append(_same_bits(held, expected.to(held.device, held.dtype)))

    def differing(self) -> list[str]:
        """The names of those that differ."""
        if not self._same:
            return []
        same = torch.stack(self._same).tolist()
        return list(dict.fromkeys(name for name, equal in zip(self._names, same, strict=True) if not equal))


def _same_bits(held: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    left, right = wide_bits(held), wide_bits(expected)
    if left.shape != right.shape:  # the memory of only one of them can be read in wide integers
        left, right = narrow_bits(held), narrow_bits(expected)
    return torch.eq(left, right).all()


def made_by_vllm(rollout: RolloutEngine) -> Tensors:
    """What layers compute with that vLLM transformed, or derived from others' weights, by the layers' names."""
    holding = rollout.transformations.holding
    return {
        f"{prefix}.{name}": own_tensors(layer)[name]
        for prefix, layer in rollout.module.named_modules()
        for name in holding.get(layer, ())
    }


def changed(tensors: Tensors, sums: Mapping[str, int]) -> list[str]:
    """The names of tensors that do not hold what they held when `sums` were taken."""
    now = sums_of({name: tensors[name] for name in sums if name in tensors})
    return [name for name, total in sums.items() if now.get(name) != total]


def in_words(problems: list[str]) -> str:
    """The first few, and how many there are beside."""
    more = f"; and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
    return "; ".join(problems[:NAMED]) + more
