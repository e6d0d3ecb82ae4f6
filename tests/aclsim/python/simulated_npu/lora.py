"""References of vllm-ascend's kernels for adapters of low rank: csrc/kernels, csrc/torch_binding.cpp.

As there, x is float16 or bfloat16 when shrunk and float32 when expanded, the rank is 8, 16, 32 or 64, and a token whose
index is negative is left alone. In expansion weights are [adapters, 1, out, rank] or without the second dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from simulated_npu.references import reference

HALVES = (torch.float16, torch.bfloat16)
RANKS = (8, 16, 32, 64)


def _weights(name: str, weight: Tensor, outputs: int, inputs: int) -> Tensor:
    if weight.dim() == 4:
        weight = weight.squeeze(1)
    if weight.shape[1:] != (outputs, inputs) or weight.dtype not in HALVES:
        shape = f"{weight.dtype} {list(weight.shape)}"
        raise ValueError(f"{name}: weight is {shape}, for {inputs} inputs and {outputs} outputs")
    return weight


@reference("_C_ascend::bgmv_shrink")
def bgmv_shrink(x: Tensor, weight: Tensor, indices: Tensor, y: Tensor, scale: float) -> None:
    """y = scale * A x with each token's own adapter; x [tokens, hidden], indices [tokens], y [tokens, rank] float32."""
    name = "_C_ascend::bgmv_shrink"
    if x.dtype not in HALVES or y.dtype != torch.float32 or x.shape[1] <= y.shape[1]:
        raise ValueError(
            f"{name}: x is {x.dtype} {list(x.shape)} and y {y.dtype} {list(y.shape)}; the kernel takes a float16 or "
            "bfloat16 x, wider than the float32 y"
        )
    weight = _weights(name, weight, y.shape[1], x.shape[1])
    chosen = indices >= 0
    y[chosen] = scale * torch.einsum("ti,toi->to", x[chosen].float(), weight[indices[chosen]].float())


@reference("_C_ascend::bgmv_expand")
def bgmv_expand(x: Tensor, weight: Tensor, indices: Tensor, y: Tensor, slice_offset: int, slice_size: int) -> Tensor:
    """y[:, slice_offset:][:, :slice_size] += B x; x [tokens, rank] float32, indices [tokens]. Returns y.

    The kernel steps from adapter to adapter by slice_size rows, without a look at how many there are. A single adapter
    may have fewer, as where logits are padded: the columns beyond, which then hold whatever is next in memory, are left
    alone.
    """
    name = "_C_ascend::bgmv_expand"
    if x.dtype != torch.float32 or y.dtype not in HALVES or x.shape[1] not in RANKS:
        raise ValueError(
            f"{name}: x is {x.dtype} {list(x.shape)} and y {y.dtype}; the kernel takes a float32 x of rank "
            "8, 16, 32 or 64, and a float16 or bfloat16 y"
        )
    if weight.shape[0] == 1:
        slice_size = min(slice_size, weight.shape[-2])
    weight = _weights(name, weight, slice_size, x.shape[1])
    chosen = indices >= 0
    added = torch.einsum("ti,toi->to", x[chosen], weight[indices[chosen]].float())
    columns = slice(slice_offset, slice_offset + slice_size)
    y[chosen, columns] = (y[chosen, columns].float() + added).to(y.dtype)
    return y


def _token_indices(lora_indices: Tensor, seq_len: Tensor, tokens: int) -> Tensor:
    """Each token's adapter, of sequences that come after another; -1 after the last one."""
    indices = lora_indices.repeat_interleave(seq_len)[:tokens]
    return torch.cat((indices, indices.new_full((tokens - indices.shape[0],), -1)))


@reference("_C_ascend::sgmv_shrink")
def sgmv_shrink(x: Tensor, weight: Tensor, lora_indices: Tensor, seq_len: Tensor, y: Tensor, scale: float) -> None:
    """bgmv_shrink with an adapter a sequence; lora_indices and seq_len [sequences]."""
    bgmv_shrink(x, weight, _token_indices(lora_indices, seq_len, x.shape[0]), y, scale)


@reference("_C_ascend::sgmv_expand")
def sgmv_expand(
    x: Tensor, weight: Tensor, lora_indices: Tensor, seq_len: Tensor, y: Tensor, slice_offset: int, slice_size: int
) -> Tensor:
    """bgmv_expand with an adapter a sequence; lora_indices and seq_len [sequences]."""
    return bgmv_expand(x, weight, _token_indices(lora_indices, seq_len, x.shape[0]), y, slice_offset, slice_size)
