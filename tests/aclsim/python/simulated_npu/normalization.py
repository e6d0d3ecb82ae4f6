"""References of root-mean-square normalization."""

from __future__ import annotations

import torch
from torch import Tensor

from simulated_npu.references import reference


def _normalized(x: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x / sqrt(mean(x², -1) + epsilon) and 1 / sqrt(...), both in float32, the latter of shape [..., 1]."""
    wide = x.float()
    reciprocal = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return wide * reciprocal, reciprocal


@reference("npu::npu_rms_norm")
def rms_norm(x: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x / rms(x) * gamma over the last dimension: (x's shape and dtype; 1 / rms in float32, [..., 1]).

    op-plugin, docs/zh/custom_APIs/torch_npu/torch_npu-npu_rms_norm.md. Rounded to x's dtype before and after gamma.
    """
    normalized, reciprocal = _normalized(x, epsilon)
    return (normalized.to(x.dtype) * gamma).to(x.dtype), reciprocal


@reference("npu::npu_add_rms_norm")
def add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """rms_norm of x1 + x2: (normalized, 1 / rms, x1 + x2). op-plugin, torch_npu-npu_add_rms_norm.md."""
    x = x1 + x2
    y, reciprocal = rms_norm(x, gamma, epsilon)
    return y, reciprocal, x


@reference("_C_ascend::npu_add_rms_norm_bias")
def add_rms_norm_bias(
    x1: Tensor, x2: Tensor, gamma: Tensor, beta: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As add_rms_norm, with beta added to what was normalized. vllm-ascend, ops/layernorm.py, AscendRMSNorm."""
    y, reciprocal, x = add_rms_norm(x1, x2, gamma, epsilon)
    return (y if beta is None else y + beta), reciprocal, x


@reference("_C_ascend::npu_gemma_rms_norm")
def gemma_rms_norm(x: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x / rms(x) * (1 + gamma), rounded once: (x's shape and dtype; 1 / rms in float32, [..., 1]).

    vllm-ascend, ops/layernorm.py, AscendGemmaRMSNorm, in the place of vLLM's GemmaRMSNorm.
    """
    normalized, reciprocal = _normalized(x, epsilon)
    return (normalized * (1.0 + gamma.float())).to(x.dtype), reciprocal
