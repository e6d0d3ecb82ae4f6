"""Take the noise out of a model that trains on what it generated itself.

A rollout engine computes without dropout. A trainer with dropout would compute another function than the one that
generated: its ratios would not be 1 before the first step, and what they correct would be noise.
"""

from __future__ import annotations

import re

import torch

NOISE = re.compile("drop|jitter")  # attention_dropout, resid_pdrop, layerdrop, router_jitter_noise, ...


def switch_off_noise(model: torch.nn.Module) -> None:
    """Make `model` compute in training mode what it computes in evaluation mode; its configuration stays as it is."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):  # noqa: SLF001  # the base of all of them
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and NOISE.search(name):
                setattr(module, name, 0.0)
