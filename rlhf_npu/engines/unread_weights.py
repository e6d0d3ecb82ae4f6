"""A vLLM model without its checkpoint: the trainer has read it, and sends the first weights as it sends all others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from vllm.config import ModelConfig
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

LOAD_FORMAT = "rlhf_npu_unread"
NOISE = 1e-3
LayOut = Callable[[torch.nn.Module], None]
_lay_out: LayOut | None = None


@contextmanager
def laid_out_by(lay_out: LayOut | None) -> Iterator[None]:
    """Within it a vLLM engine of this process makes its model, and `lay_out` may give its parameters other memory.

    It is called before vLLM transforms weights, profiles, and captures graphs. What the parameters hold must stay.
    """
    global _lay_out
    _lay_out = lay_out
    try:
        yield
    finally:
        _lay_out = None


@cache
def register_unread() -> str:
    """Make the loader known to vLLM; returns the name to give as `load_format`."""
    register_model_loader(LOAD_FORMAT)(UnreadModelLoader)
    return LOAD_FORMAT


class UnreadModelLoader(BaseModelLoader):
    """Fills the parameters with small noise.

    Noise, since what vLLM transforms after loading is told by what changed, and exchanged zeros look the same. vLLM's
    own "dummy" also overwrites buffers that nobody would send, and keeps vLLM from looking into the folder, where
    embeddings may be untied that the configuration ties.
    """

    def download_model(self, model_config: ModelConfig) -> None:
        """There is nothing to download."""

    def load_weights(self, model: Any, model_config: ModelConfig) -> None:  # noqa: ARG002
        """Leave torch's generators as they are."""
        generators: dict[torch.device, torch.Generator] = {}
        for parameter in model.parameters():
            if parameter.is_floating_point():
                device = parameter.device
                generator = generators.setdefault(device, torch.Generator(device).manual_seed(0))
                parameter.data.uniform_(-NOISE, NOISE, generator=generator)
        if _lay_out is not None:
            _lay_out(model)
