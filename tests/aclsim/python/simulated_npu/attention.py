"""References of attention. Scores and sums are in float32, and the result is rounded once.

The hardware takes float16 and bfloat16. The references also take float32, in which a test can tell a wrong formula
from rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from simulated_npu import latent_attention
from simulated_npu.cache import gathered
from simulated_npu.references import ALL_OTHERS, NotSimulatedError, reference
from simulated_npu.softmax import attend

FUSED = "npu::npu_fused_infer_attention_score"
MASK_SIZE = 2048
LEFT_UP, RIGHT_DOWN, BAND = 2, 3, 4


def _visible(queries: int, keys: int, sparse_mode: int, band: tuple[int, int], device: torch.device) -> Tensor:
    """Which keys each query sees, [queries, keys]; `band` counts the keys before and after a query's own position."""
    first = 0 if sparse_mode == LEFT_UP else keys - queries
    ahead = torch.arange(keys, device=device) - (torch.arange(queries, device=device)[:, None] + first)
    if sparse_mode == 0:
        return torch.ones_like(ahead, dtype=torch.bool)
    if sparse_mode == BAND:
        return (ahead >= -band[0]) & (ahead <= band[1])
    return ahead <= 0


def _check_mask(mask: Tensor | None, sparse_mode: int, longest: int) -> None:
    """The modes' masks are one fixed triangle of 2048 x 2048, ones above the diagonal; it is memory, and is read."""
    if sparse_mode == 0:
        if mask is not None:
            raise NotSimulatedError(f"{FUSED}: atten_mask is not simulated in sparse_mode 0")
        return
    if sparse_mode not in (LEFT_UP, RIGHT_DOWN, BAND):
        raise NotSimulatedError(f"{FUSED}: sparse_mode is not simulated, and was given as {sparse_mode}")
    if mask is None or tuple(mask.shape) != (MASK_SIZE, MASK_SIZE):
        raise ValueError(f"{FUSED}: sparse_mode {sparse_mode} needs an atten_mask of {MASK_SIZE} x {MASK_SIZE}")
    size = min(longest, MASK_SIZE)
    corner = mask[:size, :size].bool()
    if not torch.equal(corner, torch.ones_like(corner).triu(1)):
        raise ValueError(f"{FUSED}: atten_mask must be ones above the diagonal and zeros elsewhere")


def _lengths(given: Sequence[int] | Tensor | None, name: str) -> list[int]:
    if given is None:
        raise NotSimulatedError(f"{FUSED}: layout TND without {name} is not simulated")
    return [int(length) for length in given]


def _sequences(
    key: Tensor, value: Tensor, heads: int, ends: list[int], block_table: Tensor | None, block_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each sequence's keys and values, [length, heads, head size]."""
    if block_table is None:
        for begin, end in zip([0, *ends], ends, strict=False):
            yield key[begin:end], value[begin:end]
        return
    if key.dim() != 3 or key.shape[1] != block_size:
        raise NotSimulatedError(f"{FUSED}: only caches [blocks, block_size, heads * head size] are simulated")
    if block_table.shape[0] < len(ends):
        raise ValueError(f"{FUSED}: block_table has {block_table.shape[0]} rows for {len(ends)} sequences")
    for blocks, length in zip(block_table, ends, strict=False):
        yield gathered(key, blocks, length, heads), gathered(value, blocks, length, heads)


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    query_lengths: Sequence[int] | Tensor | None,
    key_lengths: Sequence[int] | Tensor | None,
    block_table: Tensor | None,
    heads: int,
    key_heads: int,
    scale: float,
    sparse: tuple[int, int, int],
    layout: str,
    block_size: int,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if layout != "TND":
        raise NotSimulatedError(f"{FUSED}: input_layout is not simulated, and was given as {layout!r}")
    query_ends = _lengths(query_lengths, "the lengths of queries")
    key_ends = _lengths(key_lengths, "the lengths of keys")
    if len(query_ends) != len(key_ends) or query_ends[-1] != query.shape[0] or query.shape[1] != heads:
        raise ValueError(
            f"{FUSED}: query {list(query.shape)} does not fit {heads} heads and lengths {query_ends} and {key_ends}"
        )
    sparse_mode, *band = sparse
    _check_mask(mask, sparse_mode, max(*query_ends, *key_ends))
    sums = query.new_empty(*query.shape[:2], 1, dtype=torch.float32)
    out = query.new_empty(*query.shape[:2], value.shape[-1] if block_table is None else value.shape[-1] // key_heads)
    sequences = _sequences(key, value, key_heads, key_ends, block_table, block_size)
    for begin, end, (keys, values) in zip([0, *query_ends], query_ends, sequences, strict=False):
        visible = _visible(end - begin, keys.shape[0], sparse_mode, (band[0], band[1]), query.device)
        out[begin:end], sums[begin:end] = attend(query[begin:end], keys, values, scale, visible, sinks)
    return out, sums


def _with_ropes(
    query: Tensor, key: Tensor, query_rope: Tensor | None, key_rope: Tensor | None, block_table: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Queries and keys with the parts that carry positions, if those are apart."""
    if query_rope is None and key_rope is None:
        return query, key
    if query_rope is None or key_rope is None or block_table is not None:
        raise NotSimulatedError(f"{FUSED}: query_rope needs key_rope, and is not simulated with block_table")
    return torch.cat((query, query_rope), -1), torch.cat((key, key_rope), -1)


@reference(FUSED, no_influence=("inner_precise",))
def fused_infer_attention_score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    atten_mask: Tensor | None,
    actual_seq_lengths: Sequence[int] | None,
    actual_seq_lengths_kv: Sequence[int] | None,
    block_table: Tensor | None,
    num_heads: int,
    scale: float,
    pre_tokens: int,
    next_tokens: int,
    input_layout: str,
    num_key_value_heads: int,
    sparse_mode: int,
    block_size: int,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    softmax_lse_flag: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention of several sequences, in layout TND: query [tokens, num_heads, head size], sequences after another.

    actual_seq_lengths are the ends of the sequences in query. Without block_table, key and value are
    [tokens, num_key_value_heads, head size] and actual_seq_lengths_kv their sequences' ends. With block_table
    [sequences, blocks], they are caches [blocks, block_size, num_key_value_heads * head size], and
    actual_seq_lengths_kv are lengths. num_key_value_heads 0 means num_heads.

    sparse_mode 0: all keys are seen. 2: those up to the query's position, counted from the first key. 3: the same,
    where the last query stands at the last key. 4: from pre_tokens before to next_tokens after that position, both
    included, as in CANN's own tests of the operator (ones above diagonal 1 + next_tokens and below -1 - pre_tokens are
    masked). Modes 2 to 4 need the mask of 2048 x 2048.

    query_rope and key_rope are further parts of queries and keys, as in attention with latent keys. Returns the mixed
    values [tokens, num_heads, head size] and, for softmax_lse_flag, the logarithms of the softmax's sums
    [tokens, num_heads, 1] in float32, else an empty tensor.
    op-plugin, docs/zh/custom_APIs/torch_npu/torch_npu-npu_fused_infer_attention_score.md.
    """
    query, key = _with_ropes(query, key, query_rope, key_rope, block_table)
    out, sums = _fused_attention(
        query,
        key,
        value,
        atten_mask,
        actual_seq_lengths,
        actual_seq_lengths_kv,
        block_table,
        num_heads,
        num_key_value_heads or num_heads,
        scale,
        (sparse_mode, pre_tokens, next_tokens),
        input_layout,
        block_size,
        None,
    )
    return out, sums if softmax_lse_flag else sums.new_empty(0)


@reference(f"{FUSED}_v2", no_influence=("inner_precise",))
def fused_infer_attention_score_v2(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    atten_mask: Tensor | None,
    actual_seq_qlen: Sequence[int] | Tensor | None,
    actual_seq_kvlen: Sequence[int] | Tensor | None,
    block_table: Tensor | None,
    learnable_sink: Tensor | None,
    num_query_heads: int,
    num_key_value_heads: int,
    softmax_scale: float,
    pre_tokens: int,
    next_tokens: int,
    input_layout: str,
    sparse_mode: int,
    block_size: int,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As fused_infer_attention_score, with learnable_sink [num_query_heads], one more score in each softmax.

    Layout BNSD_NBSD is of one query a sequence over latent keys, see latent_attention.decoded.

    op-plugin, torch_npu-npu_fused_infer_attention_score_v2.md.
    """
    if input_layout == "BNSD_NBSD" and query_rope is not None and key_rope is not None and block_table is not None:
        if sparse_mode != 0 or atten_mask is not None or learnable_sink is not None or actual_seq_kvlen is None:
            raise NotSimulatedError(f"{FUSED}_v2: masks and sinks are not simulated in input_layout BNSD_NBSD")
        keys = (key, key_rope, value)
        out = latent_attention.decoded(query, query_rope, keys, block_table, actual_seq_kvlen, softmax_scale)
        return out, query.new_empty(0, dtype=torch.float32)
    query, key = _with_ropes(query, key, query_rope, key_rope, block_table)
    out, sums = _fused_attention(
        query,
        key,
        value,
        atten_mask,
        actual_seq_qlen,
        actual_seq_kvlen,
        block_table,
        num_query_heads,
        num_key_value_heads or num_query_heads,
        softmax_scale,
        (sparse_mode, pre_tokens, next_tokens),
        input_layout,
        block_size,
        learnable_sink,
    )
    return out, sums.new_empty(0)


def _into(out: Sequence[Tensor], computed: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    out[0].copy_(computed[0].view_as(out[0]))
    return out[0], out[1]


@reference(f"{FUSED}.out", no_influence=("inner_precise", "workspace"))
def fused_infer_attention_score_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    atten_mask: Tensor | None,
    actual_seq_lengths: Sequence[int] | None,
    actual_seq_lengths_kv: Sequence[int] | None,
    block_table: Tensor | None,
    num_heads: int,
    scale: float,
    pre_tokens: int,
    next_tokens: int,
    input_layout: str,
    num_key_value_heads: int,
    sparse_mode: int,
    block_size: int,
    out: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """As fused_infer_attention_score, written to out[0]; out[1] would be the sums, which cannot be asked for."""
    computed = fused_infer_attention_score(
        query,
        key,
        value,
        atten_mask=atten_mask,
        actual_seq_lengths=actual_seq_lengths,
        actual_seq_lengths_kv=actual_seq_lengths_kv,
        block_table=block_table,
        num_heads=num_heads,
        scale=scale,
        pre_tokens=pre_tokens,
        next_tokens=next_tokens,
        input_layout=input_layout,
        num_key_value_heads=num_key_value_heads,
        sparse_mode=sparse_mode,
        block_size=block_size,
    )
    return _into(out, computed)


@reference(f"{FUSED}_v2.out", no_influence=("inner_precise", "workspace"))
def fused_infer_attention_score_v2_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    atten_mask: Tensor | None,
    actual_seq_qlen: Sequence[int] | None,
    actual_seq_kvlen: Sequence[int] | None,
    block_table: Tensor | None,
    learnable_sink: Tensor | None,
    num_query_heads: int,
    num_key_value_heads: int,
    softmax_scale: float,
    pre_tokens: int,
    next_tokens: int,
    input_layout: str,
    sparse_mode: int,
    block_size: int,
    out: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """As fused_infer_attention_score_v2, written to out[0]; out[1] would be the sums, which cannot be asked for."""
    computed = fused_infer_attention_score_v2(
        query,
        key,
        value,
        atten_mask=atten_mask,
        actual_seq_qlen=actual_seq_qlen,
        actual_seq_kvlen=actual_seq_kvlen,
        block_table=block_table,
        learnable_sink=learnable_sink,
        num_query_heads=num_query_heads,
        num_key_value_heads=num_key_value_heads,
        softmax_scale=softmax_scale,
        pre_tokens=pre_tokens,
        next_tokens=next_tokens,
        input_layout=input_layout,
        sparse_mode=sparse_mode,
        block_size=block_size,
    )
    return _into(out, computed)


@reference("npu::_npu_fused_infer_attention_score_get_max_workspace", no_influence=ALL_OTHERS)
@reference("npu::_npu_fused_infer_attention_score_v2_get_max_workspace", no_influence=ALL_OTHERS)
@reference("atb::_npu_paged_attention_get_workspace", no_influence=ALL_OTHERS)
def workspace(query: Tensor) -> Tensor:
    """Room for what an operator computes on the way, of which the references need none: a byte."""
    return query.new_empty(1, dtype=torch.uint8)


@reference("atb::_npu_paged_attention", no_influence=("workspace",))
def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    num_kv_heads: int,
    num_heads: int,
    scale_value: float,
    block_table: Tensor,
    context_lens: Tensor,
    out: Tensor,
) -> None:
    """Attention of one query a sequence over its cached keys, written to out.

    query and out [sequences, num_heads, head size] or with the last two as one; caches
    [blocks, block size, num_kv_heads, head size]; block_table [sequences, blocks]; context_lens [sequences], on the
    host. vllm-ascend, attention/attention_v1.py, forward_paged_attention.
    """
    lengths: list[Any] = context_lens.tolist()
    if len(lengths) != query.shape[0]:
        raise ValueError(f"atb::_npu_paged_attention: {query.shape[0]} queries, and {len(lengths)} context_lens")
    heads = query.view(query.shape[0], num_heads, -1)
    for row, (blocks, length) in enumerate(zip(block_table, lengths, strict=False)):
        keys, values = (gathered(cache, blocks, length, num_kv_heads) for cache in (key_cache, value_cache))
        visible = torch.ones(1, length, dtype=torch.bool, device=query.device)
        mixed, _ = attend(heads[row : row + 1], keys, values, scale_value, visible)
        out[row] = mixed.view(out[row].shape)
