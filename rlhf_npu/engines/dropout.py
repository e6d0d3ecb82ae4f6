"""Take the noise out of a model that trains on what it generated itself.

A rollout engine computes without dropout. A trainer with dropout would compute another function than the one that
generated: its ratios would not be 1 before the first step, and what they correct would be noise.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

NOISE = re.compile("drop|jitter")  # attention_dropout, resid_pdrop, layerdrop, router_jitter_noise, ...


def switch_off_noise(model: PreTrainedModel) -> None:
    """Make `model` compute in training mode what it computes in evaluation mode.

    Models read the probabilities from their modules or, while they compute, from their configuration; what that said is
    what `noise_as_configured` brings back for a while.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):  # noqa: SLF001  # the base of all of them
            module.p = 0.0
        for name in _noisy(module):
            setattr(module, name, 0.0)
    model.switched_off = [(config, _noisy(config)) for config in _configs(model.config)]
    for config, noise in model.switched_off:
        for name in noise:
            setattr(config, name, 0.0)


@contextmanager
def noise_as_configured(model: PreTrainedModel) -> Iterator[None]:
    """Within it the model's configuration is what it was when it was loaded, to be saved."""
    for config, noise in model.switched_off:
        for name, value in noise.items():
            setattr(config, name, value)
    try:
        yield
    finally:
        for config, noise in model.switched_off:
            for name in noise:
                setattr(config, name, 0.0)


def _noisy(holder: Any) -> dict[str, float]:
    return {
        name: value
        for name, value in vars(holder).items()
        if isinstance(value, float) and value > 0 and NOISE.search(name)
    }


def _configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig):
            yield from _configs(part)
