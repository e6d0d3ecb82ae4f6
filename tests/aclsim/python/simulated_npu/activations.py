"""References of activations. All are computed in float32 and rounded once."""

from __future__ import annotations

import torch
from torch import Tensor

from simulated_npu.references import reference


@reference("npu::npu_swiglu")
def swiglu(x: Tensor, dim: int) -> Tensor:
    """silu of the first half of `dim` times the second half. op-plugin, torch_npu-npu_swiglu.md."""
    if x.shape[dim] % 2:
        raise ValueError(f"npu::npu_swiglu: dimension {dim} of {list(x.shape)} must be even")
    gate, up = x.float().chunk(2, dim)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)


@reference("npu::npu_fast_gelu")
def fast_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), to which the formula of op-plugin's torch_npu-npu_fast_gelu.md comes down."""
    wide = x.float()
    return (wide * torch.sigmoid(1.702 * wide)).to(x.dtype)
