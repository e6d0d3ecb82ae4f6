"""References of quantization to 8 bits: what vllm-ascend traces for the patterns that its fusion passes look for."""

from __future__ import annotations

import torch
from torch import Tensor

from simulated_npu.references import NotSimulatedError, reference

LARGEST = 127.0
QINT8 = 12  # torch.qint8: operators get the number of c10::ScalarType


@reference("npu::npu_dynamic_quant")
def dynamic_quant(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., K] as int8 with a scale a token: (round(x / scale), scale [...] in float32), scale = max |x| / 127.

    op-plugin, docs/zh/custom_APIs/torch_npu/torch_npu-npu_dynamic_quant.md. A token of zeros has the scale 0.
    """
    wide = x.float()
    scale = wide.abs().amax(-1) / LARGEST
    return (wide / torch.where(scale > 0, scale, 1.0).unsqueeze(-1)).round().to(torch.int8), scale


@reference("npu::npu_quantize")
def quantize(x: Tensor, scales: Tensor, zero_points: Tensor | None, dtype: int, axis: int, div_mode: bool) -> Tensor:
    """x [..., K] as int8: round(x * scales + zero_points), saturated; scales and zero_points have the shape [K].

    op-plugin, torch_npu-npu_quantize.md, with div_mode False, for the last dimension and torch.qint8.
    """
    if div_mode or axis not in (-1, x.dim() - 1) or dtype != QINT8:
        raise NotSimulatedError(f"npu::npu_quantize: dtype {dtype}, axis {axis} and div_mode {div_mode} together")
    moved = x.float() * scales.float() + (0.0 if zero_points is None else zero_points.float())
    return moved.round().clamp(-LARGEST - 1, LARGEST).to(torch.int8)
