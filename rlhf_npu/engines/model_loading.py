"""Weights of a trainer's model go straight to where they stay while they are read: no rank holds a second copy.

transformers makes the model without memory, maps its files, and sets one weight after the other. Each is put in its
place before the next is read: on the device, or, under ZeRO-3, as this rank's shard. Pages of a file that were read
belong to the operating system, and the ranks of a node share them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel, core_model_loading

from rlhf_npu.platform import CPU

Place = Callable[[torch.nn.Parameter], None]
ONE_BY_ONE = "HF_DEACTIVATE_ASYNC_LOAD"  # otherwise transformers' threads read, and cast, far ahead of what is placed

TRIM_EVERY = 8 << 20  # bytes; what was read and freed lies between what stays, and the C library would keep it


def place_for(zero_stage: int, dtype: torch.dtype, device: torch.device) -> Place:
    """Where a parameter stays under DeepSpeed: whole on `device`, or as this rank's shard there.

    With shards torch.distributed must be initialised, and all ranks place the same parameters in the same order.
    """
    return _Sharding(dtype, device) if zero_stage == 3 else _moving_to(device)


@contextmanager
def placing(place: Place) -> Iterator[None]:
    """Within it `from_pretrained` places each weight that it has read; `place_rest` does what it leaves."""
    set_weight, before = core_model_loading.set_param_for_module, os.environ.get(ONE_BY_ONE)

    def set_and_place(model: PreTrainedModel, name: str, *arguments: Any, **named: Any) -> None:
        set_weight(model, name, *arguments, **named)
        path, _, own_name = name.rpartition(".")
        parameter = dict(model.get_submodule(path).named_parameters(recurse=False)).get(own_name)
        if parameter is not None and not parameter.is_meta and path not in _tied_modules(model):
            place(parameter)

    core_model_loading.set_param_for_module = set_and_place
    os.environ[ONE_BY_ONE] = "1"
    try:
        yield
    finally:
        core_model_loading.set_param_for_module = set_weight
        os.environ.pop(ONE_BY_ONE) if before is None else os.environ.update({ONE_BY_ONE: before})


def place_rest(module: torch.nn.Module, place: Place, device: torch.device) -> None:
    """Place the parameters that are in no place yet, and move the buffers to `device`."""
    for parameter in module.parameters():
        place(parameter)
    module.to(device)


def _tied_modules(model: PreTrainedModel) -> set[str]:
    """Modules whose weights transformers compares, and pads, once all are read: it must find them whole."""
    return {name.rpartition(".")[0] for pair in model.all_tied_weights_keys.items() for name in pair}


def _moving_to(device: torch.device) -> Place:
    def move(parameter: torch.nn.Parameter) -> None:
        parameter.data = parameter.data.to(device)

    return move


class _Sharding:
    """Leaves of each parameter what ZeRO-3 keeps of it on this rank."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device = device
        self._shard: Callable[..., None] | None = None
        self._untrimmed = 0

    def __call__(self, parameter: torch.nn.Parameter) -> None:
        if hasattr(parameter, "ds_id"):
            return
        # DeepSpeed writes to it before it cuts it: pages of a file would become this process's own.
        parameter.data = parameter.data.to(self._device, self._dtype, copy=True)
        if self._shard is None:
            self._shard_first(parameter)
        else:
            self._shard(param_list=[parameter])
        self._trim(parameter)

    def _shard_first(self, parameter: Any) -> None:
        import deepspeed

        config = {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": self._dtype is torch.bfloat16},
            "zero_optimization": {"stage": 3},
        }
        deepspeed.zero.Init(module=torch.nn.ParameterList([parameter]), config_dict_or_path=config)
        self._shard = parameter.convert_to_zero_parameters

    def _trim(self, parameter: Any) -> None:
        self._untrimmed += parameter.ds_numel * parameter.element_size()
        if self._untrimmed >= TRIM_EVERY:
            CPU.empty_cache()
            self._untrimmed = 0
