"""Load new weights into a vLLM model that runs: in place, also where vLLM has transformed what it loaded.

vLLM changes some weights after loading: experts are packed for the kernel that computes with them, and attention with
latent keys keeps products of other layers' weights. Plain weights written over those would be read in the wrong order,
or not at all. Which layers these are is seen while the model loads: what differs afterwards was transformed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from rlhf_npu.engines.tensor_bits import ordered_bits_sum

Tensors = dict[str, torch.Tensor]


@dataclass
class Transformations:
    """What vLLM did to a model's weights after loading them.

    Attributes:
        transformed: layers whose weights it changed.
        derived: attention layers that keep something computed from other layers' weights.
        added: the names of a layer's tensors that were not there before.
    """

    transformed: list[torch.nn.Module] = field(default_factory=list)
    derived: list[torch.nn.Module] = field(default_factory=list)
    added: dict[torch.nn.Module, set[str]] = field(default_factory=dict)


_asked_for: Transformations | None = None


@contextmanager
def watch_loading() -> Iterator[Transformations]:
    """Within it a vLLM engine of this process loads its model; the result is complete when it has."""
    global _asked_for
    _asked_for = Transformations()
    try:
        yield _asked_for
    finally:
        _asked_for = None


@contextmanager
def watched_if_asked() -> Iterator[None]:
    """Within it a worker of ours loads its model: by now vllm-ascend has put its functions in the place of vLLM's."""
    if _asked_for is None:
        yield
        return
    from vllm.model_executor.model_loader import base_loader

    seen, process = _asked_for, base_loader.process_weights_after_loading

    def watched(model: torch.nn.Module, *arguments: Any, **named: Any) -> None:
        before = {layer: _look_at(layer) for layer in model.modules()}
        process(model, *arguments, **named)
        _compare(before, seen)

    base_loader.process_weights_after_loading = watched
    try:
        yield
    finally:
        base_loader.process_weights_after_loading = process


@contextmanager
def updating_weights(vllm_config: Any, device: torch.device, seen: Transformations) -> Iterator[None]:
    """Within it the model's `load_weights` may be called, with parts of the weights, until all were given.

    Transformed layers are loaded anew by vLLM's own layerwise reload, which transforms them and copies the result to
    where it was; all others are overwritten directly. No tensor of the model moves.
    """
    kept = [(layer, own_tensors(layer)) for layer in (*seen.transformed, *seen.derived)]
    with ExitStack() as stack:
        if seen.transformed:
            stack.enter_context(_as_when_loading(vllm_config, device))
            _reload_anew(seen.transformed, vllm_config, stack)
        yield
    if seen.derived:
        with _as_when_loading(vllm_config, device):
            for layer in seen.derived:
                process: Any = layer.process_weights_after_loading
                process(vllm_config.model_config.dtype)
    for layer, tensors in kept:
        _keep_addresses(layer, tensors)


@contextmanager
def _as_when_loading(vllm_config: Any, device: torch.device) -> Iterator[None]:
    """What layers find around them when vLLM makes them; each of torch's calls is slower within it."""
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(vllm_config), torch.device(device):
        yield


def _reload_anew(layers: list[torch.nn.Module], vllm_config: Any, stack: ExitStack) -> None:
    from vllm.model_executor.model_loader import reload

    for layer in layers:
        reload.initialize_layerwise_reload(layer)
        stack.callback(reload.finalize_layerwise_reload, layer, vllm_config.model_config)


IMPL = "impl."  # vLLM's attention layers have an implementation, which is no module


def own_tensors(layer: torch.nn.Module) -> Tensors:
    """A layer's own parameters, buffers and tensors in plain attributes, by name; those of its implementation too."""
    plain = {name: value for name, value in vars(layer).items() if isinstance(value, torch.Tensor)}
    inner = vars(layer).get("impl")
    if hasattr(inner, "__dict__"):
        plain |= {IMPL + name: value for name, value in vars(inner).items() if isinstance(value, torch.Tensor)}
    return plain | dict(layer.named_parameters(recurse=False)) | dict(layer.named_buffers(recurse=False))


Look = dict[str, tuple[torch.Size, torch.dtype, int]]


def _look_at(layer: torch.nn.Module) -> Look:
    """What a layer's tensors hold now, wherever they are."""
    return {
        name: (tensor.shape, tensor.dtype, ordered_bits_sum(tensor))
        for name, tensor in own_tensors(layer).items()
        if not tensor.is_meta
    }


def _compare(before: dict[torch.nn.Module, Look], seen: Transformations) -> None:
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    for layer, look in before.items():
        after = _look_at(layer)
        if after != look:
            seen.added[layer] = after.keys() - look.keys()
            (seen.derived if isinstance(layer, AttentionLayerBase) else seen.transformed).append(layer)


@torch.no_grad()
def _keep_addresses(layer: torch.nn.Module, before: Tensors) -> None:
    """Put what was computed anew where it was before: captured graphs hold the addresses."""
    for name, tensor in before.items():
        holder = layer.impl if name.startswith(IMPL) else layer
        now = getattr(holder, name.removeprefix(IMPL))
        if now is not tensor:
            tensor.copy_(now)
            setattr(holder, name.removeprefix(IMPL), tensor)
