"""Log-probabilities and entropies from logits, without a second copy of the logits in float32.

Logits are the largest tensor of a step: (B, T, V) with V of 100,000 and more. Both functions go through
them in chunks along time, compute a chunk in float32 (or float64 if the logits are), and keep only (B, T)
numbers for the backward pass, which recomputes the probabilities. The one large tensor that backward makes
is the logits' gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 1 << 24
"""Logits computed in float32 at a time, at most: 64 MiB."""


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at the labels.

    Args:
        logits: (B, T, V) of any floating type.
        labels: (B, T) int64 token ids.
        temperature: above 0; that of sampling.

    Returns:
        (B, T) float32, or float64 for logits in float64.
    """
    return _LogProbs.apply(logits, labels, temperature)


def entropy_from_logits(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of softmax(logits / temperature).

    Args:
        logits: (B, T, V) of any floating type.
        temperature: above 0; that of sampling.

    Returns:
        (B, T) float32, or float64 for logits in float64.
    """
    return _Entropy.apply(logits, temperature)


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
        parts = []
        for time in _chunks(logits):
            log_probs = _scaled(logits[:, time], temperature).log_softmax(-1)
            parts.append(log_probs.gather(-1, labels[:, time, None]).squeeze(-1))
        ctx.save_for_backward(logits, labels)
        ctx.temperature = temperature
        return torch.cat(parts, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, labels = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        for time in _chunks(logits):
            scale = (grad[:, time] / ctx.temperature)[..., None]
            part = _scaled(logits[:, time], ctx.temperature).softmax(-1).mul_(-scale)
            part.scatter_add_(-1, labels[:, time, None], scale.to(part))
            grad_logits[:, time] = part
        return grad_logits, None, None


class _Entropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, temperature: float) -> Tensor:
        parts = []
        for time in _chunks(logits):
            log_probs = _scaled(logits[:, time], temperature).log_softmax(-1)
            parts.append(-(log_probs.exp() * log_probs).nan_to_num_(nan=0.0).sum(-1))
        entropy = torch.cat(parts, 1)
        ctx.save_for_backward(logits, entropy)
        ctx.temperature = temperature
        return entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, entropy = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        for time in _chunks(logits):
            log_probs = _scaled(logits[:, time], ctx.temperature).log_softmax(-1)
            surprise = log_probs + entropy[:, time, None]
            part = (log_probs.exp_() * surprise).nan_to_num_(nan=0.0)
            grad_logits[:, time] = part.mul_((-grad[:, time] / ctx.temperature)[..., None])
        return grad_logits, None


def _chunks(logits: Tensor) -> Iterator[slice]:
    batch, length, vocabulary = logits.shape
    step = max(1, CHUNK_ELEMENTS // (batch * vocabulary))
    return (slice(start, start + step) for start in range(0, length, step))


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
