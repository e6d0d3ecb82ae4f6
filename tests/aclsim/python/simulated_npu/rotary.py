"""References of rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from simulated_npu.references import NotSimulatedError, reference


@reference("atb::_npu_rotary_embedding")
def rotary_embedding(
    positions: Tensor, query: Tensor, key: Tensor, head_size: int, cos_sin_cache: Tensor, is_neox_style: bool
) -> None:
    """Turns each head of query and key in place by the angles of its token's position.

    positions [tokens]; query, key [tokens, heads * head_size]; cos_sin_cache [positions, head_size], the first half
    of a row cosines, the second sines. Pairs are (i, i + head_size / 2) in neox style, else (2i, 2i + 1). A model
    that turns only a part of each head passes that part alone (vllm-ascend, ops/rotary_embedding.py,
    rope_forward_oot).
    """
    if cos_sin_cache.shape[-1] != head_size:
        raise NotSimulatedError(
            f"atb::_npu_rotary_embedding: cos_sin_cache has rows of {cos_sin_cache.shape[-1]}, and head_size is "
            f"{head_size}: heads that are turned in part are not simulated"
        )
    cos, sin = cos_sin_cache[positions.flatten()][:, None].chunk(2, -1)
    for states in (query, key):
        heads = states.view(states.shape[0], -1, head_size)
        heads.copy_(_turned(heads, cos, sin, is_neox_style))


def _turned(heads: Tensor, cos: Tensor, sin: Tensor, is_neox_style: bool) -> Tensor:
    cos, sin = cos.to(heads.dtype), sin.to(heads.dtype)
    if is_neox_style:
        first, second = heads.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    first, second = heads[..., ::2], heads[..., 1::2]
    return torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2)


@reference("npu::npu_rotary_mul")
def rotary_mul(x: Tensor, cos: Tensor, sin: Tensor, *, rotary_mode: str) -> Tensor:
    """x * cos + rotate(x) * sin; cos and sin as wide as a head. op-plugin, torch_npu-npu_rotary_mul.md.

    rotate is (-second half, first half) in mode "half", and (-x[1], x[0], -x[3], x[2], ...) in "interleave".
    """
    if rotary_mode == "half":
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin
    if rotary_mode == "interleave":
        return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sin
    raise NotSimulatedError(f"npu::npu_rotary_mul: rotary_mode is not simulated, and was given as {rotary_mode!r}")
