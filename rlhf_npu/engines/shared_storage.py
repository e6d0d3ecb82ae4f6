"""One storage for the weights that are trained and those that generate.

A flat tensor holds every trained parameter once, one after the other, in an order that puts together what vLLM has in
one tensor. vLLM's parameters are views of it from when they are loaded, before graphs are captured; the trainer takes
it for its own once DeepSpeed has made its engine. From then on an optimizer step writes what the rollout computes with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from rlhf_npu.errors import SharingError

ALIGNMENT = 64  # bytes: kernels read vectors of them, and AscendCL copies between such addresses only


@dataclass(frozen=True)
class SharedStorage:
    """Where each trained parameter is, and which of them the rollout has too.

    Attributes:
        flat: (N,); all trained parameters, then the padding by which ZeRO makes N a multiple of its ranks.
        starts: by the policy's name of a parameter, the element of `flat` at which it begins; in their order.
        tensors: by the rollout's name of a parameter that is here, the policy's names of those that it is made of.
    """

    flat: torch.Tensor
    starts: Mapping[str, int]
    tensors: Mapping[str, Sequence[str]]

    @property
    def shared(self) -> frozenset[str]:
        """The policy's names of the parameters with which the rollout computes."""
        return frozenset(name for parts in self.tensors.values() for name in parts)

    def in_order(self, module: torch.nn.Module) -> list[torch.nn.Parameter]:
        """The trained parameters of the policy as DeepSpeed is to flatten them.

        Raises:
            SharingError: they are others than the storage was made for.
        """
        trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        if others := sorted(trained.keys() ^ self.starts.keys()):
            raise SharingError(f"the storage was made for other parameters than are trained: {', '.join(others)}")
        return [trained[name] for name in self.starts]

    @torch.no_grad()
    def give_to(self, engine: Any) -> None:
        """Let a DeepSpeed engine of ZeRO 0, 1 or 2 keep its parameters here; their contents stay what they are.

        Raises:
            SharingError: the engine lays them out in another way, or keeps a view of where they were.
        """
        if engine.zero_optimization_stage() == 0:
            self._take_parameters(engine.module)
        else:
            self._stand_in_for_flat_group(engine)
        if strays := self.strays_of_policy(engine.module):
            raise SharingError(f"after ZeRO took the shared storage these are elsewhere: {', '.join(strays)}")

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor is a view of it."""
        return tensor.untyped_storage().data_ptr() == self.flat.untyped_storage().data_ptr()

    def strays_of_policy(self, policy: torch.nn.Module) -> list[str]:
        """The names of the policy's parameters that are not where the storage has them."""
        return self._strays(policy, self.starts)

    def strays_of_rollout(self, rollout: torch.nn.Module) -> list[str]:
        """The names of the rollout's parameters that are not where the storage has them."""
        return self._strays(rollout, {name: self.starts[parts[0]] for name, parts in self.tensors.items()})

    def _strays(self, module: torch.nn.Module, starts: Mapping[str, int]) -> list[str]:
        begin, width = self.flat.data_ptr(), self.flat.element_size()
        parameters = dict(module.named_parameters())
        return [name for name, start in starts.items() if parameters[name].data_ptr() != begin + start * width]

    def _take_parameters(self, module: torch.nn.Module) -> None:
        for start, parameter in zip(self.starts.values(), self.in_order(module), strict=True):
            view = self.flat.narrow(0, start, parameter.numel()).view(parameter.shape)
            parameter.data = view.copy_(parameter)

    def _stand_in_for_flat_group(self, engine: Any) -> None:
        """As DeepSpeed itself puts another buffer in the place of its own when it reloads offloaded parameters."""
        optimizer = engine.optimizer
        self._compare_with(optimizer.bit16_groups_flat, engine.module)
        (own,) = optimizer.bit16_groups_flat
        own_storage = StorageWeakRef(own.untyped_storage())
        self.flat.copy_(own)
        own.data = self.flat
        optimizer.parallel_partitioned_bit16_groups[:] = [optimizer.get_data_parallel_partitions(own, 0)]
        optimizer._update_model_bit16_weights(0)  # noqa: SLF001
        optimizer._link_all_hp_params()  # noqa: SLF001
        if not own_storage.expired():
            raise SharingError("DeepSpeed keeps a view of its own flat buffer, which the shared storage stands in for")

    def _compare_with(self, groups: list[torch.Tensor], module: torch.nn.Module) -> None:
        if [group.numel() for group in groups] != [self.flat.numel()] or groups[0].dtype is not self.flat.dtype:
            seen = [f"{group.numel()} of {group.dtype}" for group in groups]
            raise SharingError(f"the storage has {self.flat.numel()} elements of {self.flat.dtype}, ZeRO's are {seen}")
        begin, width = groups[0].data_ptr(), groups[0].element_size()
        for start, parameter in zip(self.starts.values(), self.in_order(module), strict=True):
            if parameter.data_ptr() != begin + start * width:
                raise SharingError("ZeRO flattens the parameters in another order than the storage has them in")
