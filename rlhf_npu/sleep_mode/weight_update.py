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

from rlhf_npu.sleep_mode.tensor_bits import ordered_bits_sum

Tensors = dict[str, torch.Tensor]


@dataclass
class Transformations:
    """What vLLM did to a model's weights after loading them.

    Attributes:
        transformed: layers whose weights it changed.
        derived: attention layers that keep something computed from other layers' weights.
        added: the names of a layer's tensors that were not there before.
        holding: by transformed or derived layer, the names of the tensors that it computes with.
        buffers: what the model's buffers held when it was loaded, as sums of their bits; nothing may change those that
            no checkpoint has (the tables of rotary embeddings).
    """

    transformed: list[torch.nn.Module] = field(default_factory=list)
    derived: list[torch.nn.Module] = field(default_factory=list)
    added: dict[torch.nn.Module, set[str]] = field(default_factory=dict)
    holding: dict[torch.nn.Module, list[str]] = field(default_factory=dict)
    buffers: dict[str, int] = field(default_factory=dict)


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
        seen.buffers.update(sums_of(dict(model.named_buffers())))

    base_loader.process_weights_after_loading = watched
    try:
        yield
    finally:
        base_loader.process_weights_after_loading = process


@contextmanager
def updating_weights(vllm_config: Any, device: torch.device, seen: Transformations) -> Iterator[None]:
    """Within it the model's `load_weights` may be called, with parts of the weights, until all were given.

    Transformed layers are loaded anew by vLLM's own layerwise reload, which transforms them and copies the result to
    where it was; all others are overwritten directly. No tensor of the model moves. After an error the layers have the
    tensors that they had, and these hold anything.
    """
    kept = [(layer, own_tensors(layer)) for layer in (*seen.transformed, *seen.derived)]
    parts = [part for layer, _ in kept for part in layer.modules()]
    with _put_back_after_an_error(parts):
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
def _put_back_after_an_error(layers: list[torch.nn.Module]) -> Iterator[None]:
    """vLLM leaves a layer that it could not transform without its tensors, and takes it for one that it has loaded."""
    before = [(layer, _Holdings(layer)) for layer in layers]
    try:
        yield
    except BaseException:
        for layer, holdings in before:
            holdings.put_back(layer)
        raise


class _Holdings:
    """Which tensors a layer has, by how it has them; not what is in them."""

    def __init__(self, layer: torch.nn.Module) -> None:
        self._parameters, self._buffers = dict(layer._parameters), dict(layer._buffers)  # noqa: SLF001
        self._of_no_checkpoint = set(layer._non_persistent_buffers_set)  # noqa: SLF001
        registered = self._parameters.keys() | self._buffers.keys()
        self._plain = {name: tensor for name, tensor in own_tensors(layer).items() if name not in registered}

    def put_back(self, layer: torch.nn.Module) -> None:
        """Let the layer have them again, and no others."""
        from vllm.model_executor.model_loader.reload import layerwise

        for name in {*layer._parameters, *layer._buffers}:  # noqa: SLF001
            delattr(layer, name)
        for name, parameter in self._parameters.items():
            layer.register_parameter(name, parameter)
        for name, buffer in self._buffers.items():
            layer.register_buffer(name, buffer, persistent=name not in self._of_no_checkpoint)
        for name, tensor in self._plain.items():
            setattr(layer.impl if name.startswith(IMPL) else layer, name.removeprefix(IMPL), tensor)
        layerwise.get_layerwise_info(layer).reset()


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


def sums_of(tensors: Tensors) -> dict[str, int]:
    """By name, a sum of the bits that a tensor holds, which changes with their order."""
    return {name: ordered_bits_sum(tensor) for name, tensor in tensors.items() if not tensor.is_meta}


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
            seen.holding[layer] = [name for name, (shape, _, _) in after.items() if shape.numel()]
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
