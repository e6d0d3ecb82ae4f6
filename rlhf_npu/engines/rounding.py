"""How much of a model's scores rounding can change, by Monte Carlo arithmetic (Parker 1997)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Where two computations are both right, they differ by about as much as rounding explains: docs/models.md has figures.
MEAN_FACTOR = 3.0
MAX_FACTOR = 8.0
FLOOR = 1e-5  # nats; below it float32's sums of a row of logits differ


@contextmanager
def rounding_noise(model: torch.nn.Module) -> Iterator[None]:
    """Within it each layer's output is off by one rounding, at random."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)

    def disturb(_module: torch.nn.Module, _inputs: Any, output: Any) -> Any:
        if not isinstance(output, torch.Tensor) or not output.is_floating_point():
            return output
        noise = torch.empty_like(output).uniform_(-0.5, 0.5, generator=generator)
        return output * (1 + torch.finfo(output.dtype).eps * noise)

    leaves = [module for module in model.modules() if not any(True for _ in module.children())]
    hooks = [module.register_forward_hook(disturb) for module in leaves]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
