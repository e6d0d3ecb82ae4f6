"""References of attention with latent keys, as DeepSeek's: a vector a token gives the keys and values of all heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from simulated_npu.normalization import rms_norm
from simulated_npu.references import NotSimulatedError, reference
from simulated_npu.softmax import attend


@reference("npu::npu_interleave_rope")
def interleave_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (2i, 2i + 1) of x [B, N, S, D], and puts first the first ones of all pairs, then the second.

    cos and sin [B, 1, S or 1, D] hold each angle twice, in halves. op-plugin, torch_npu-npu_interleave_rope.md.
    """
    first, second = x[..., ::2], x[..., 1::2]
    return torch.cat((first, second), -1) * cos + torch.cat((-second, first), -1) * sin


@reference("npu::npu_kv_rmsnorm_rope_cache")
def kv_rmsnorm_rope_cache(
    kv: Tensor,
    gamma: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor,
    k_cache: Tensor,
    ckv_cache: Tensor,
    *,
    epsilon: float,
    cache_mode: str,
    is_output_kv: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalizes the latent part of kv [B, 1, S, latent + rope], turns the rest, and writes both to slots `index`.

    gamma [latent]; cos and sin as of interleave_rope; caches [blocks, block size, 1, rope] and [..., latent]. Returns
    the caches, and for is_output_kv the parts themselves, else nothing. op-plugin,
    torch_npu-npu_kv_rmsnorm_rope_cache.md, of which cache_mode PA is simulated.
    """
    if cache_mode not in ("PA", "PA_BNSD"):
        raise NotSimulatedError(f"npu::npu_kv_rmsnorm_rope_cache: cache_mode is not simulated, and is {cache_mode!r}")
    latent, rope = kv.split([gamma.shape[0], kv.shape[-1] - gamma.shape[0]], -1)
    normalized, _ = rms_norm(latent, gamma, epsilon)
    turned = interleave_rope(rope, cos, sin)
    kept = index >= 0
    for new, cache in ((turned, k_cache), (normalized, ckv_cache)):
        cache.view(-1, cache.shape[-1])[index[kept]] = new.reshape(-1, cache.shape[-1])[kept]
    outputs = (turned, normalized) if is_output_kv else (kv.new_empty(0), kv.new_empty(0))
    return k_cache, ckv_cache, *outputs


def decoded(
    query: Tensor,
    query_rope: Tensor,
    caches: tuple[Tensor, Tensor, Tensor],
    block_table: Tensor,
    lengths: Sequence[int] | Tensor,
    scale: float,
) -> Tensor:
    """Attention of one query a sequence, whose heads share one head of keys.

    query [B, N, 1, latent] and query_rope [B, N, 1, rope]; caches of keys, their ropes, and values,
    [blocks, 1, block size, latent or rope]; block_table [B, blocks]; lengths [B]. Returns [N, B, 1, latent].
    """
    if query.shape[2] != 1 or any(cache.shape[1] != 1 for cache in caches) or len(lengths) != query.shape[0]:
        raise NotSimulatedError(f"latent attention: query {list(query.shape)}, keys {list(caches[0].shape)}")
    out = torch.empty_like(query)
    for row, length in enumerate(int(length) for length in lengths):
        blocks = block_table[row, : -(-length // caches[0].shape[2])].long()
        key, rope, value = (cache[blocks].flatten(0, 2)[:length, None] for cache in caches)
        whole = torch.cat((query[row, :, 0], query_rope[row, :, 0]), -1)[None]
        visible = torch.ones(1, length, dtype=torch.bool, device=query.device)
        out[row, :, 0], _ = (part[0] for part in attend(whole, torch.cat((key, rope), -1), value, scale, visible))
    return out.transpose(0, 1).contiguous()


@reference("npu::npu_transpose_batchmatmul")
def transpose_batchmatmul(x: Tensor, weight: Tensor, *, perm_y: Sequence[int] | None) -> Tensor:
    """x [N, B, K] times weight [N, K, M], with the result [N, B, M] permuted. op-plugin,
    torch_npu-npu_transpose_batchmatmul.md."""
    product = (x.float() @ weight.float()).to(x.dtype)
    return product if perm_y is None else product.permute(*perm_y).contiguous()
