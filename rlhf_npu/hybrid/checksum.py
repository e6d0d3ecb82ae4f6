"""A checksum of weights that does not depend on how they are fused, ordered, padded or sharded.

The checksum is the sum of all elements' bit patterns as integers, modulo 2**64. Zero padding adds nothing to it,
fusing q, k and v does not change it, and the shards of a tensor-parallel layer add up to the whole layer's. It proves
that each update arrived, however small; that it arrived in its place is proved by `same_function`, with scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from rlhf_npu.engines.tensor_bits import MODULUS, bits_sum

Added = Mapping[torch.nn.Module, set[str]]


def rollout_checksum(model: torch.nn.Module, added: Added | None = None) -> int:
    """The checksum of a vLLM model over all ranks of its tensor-parallel group, which call this together.

    Args:
        model: this rank's shard.
        added: by layer, the names of parameters that vLLM computed from others, which are not counted.
    """
    from vllm.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    owned = _owned(model, group.rank_in_group, added or {})
    local = sum(bits_sum(tensor) for tensor in owned) % MODULUS
    if group.world_size == 1:
        return local
    # int64 addition wraps around, which is addition modulo 2**64.
    signed = local - MODULUS if local >= MODULUS // 2 else local
    total = torch.tensor(signed, dtype=torch.int64)
    torch.distributed.all_reduce(total, group=group.cpu_group)
    return int(total.item()) % MODULUS


def _owned(model: torch.nn.Module, tp_rank: int, added: Added) -> Iterator[torch.Tensor]:
    """The parts of the parameters that `tp_rank` counts, so that each element of the whole is counted once."""
    from vllm.model_executor.layers.linear import QKVParallelLinear

    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or name in added.get(module, ()):
                continue
            seen.add(id(parameter))
            if isinstance(module, QKVParallelLinear) and module.tp_size > 1:
                yield from _owned_qkv(module, parameter.data, tp_rank)
            elif tp_rank == 0 or _is_sharded(module, name):
                yield parameter.data


def _is_sharded(module: torch.nn.Module, name: str) -> bool:
    from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    if hasattr(module, "w13_weight"):  # experts, whose class has another name in each version of vLLM
        return name != "w2_bias"
    if isinstance(module, RowParallelLinear):
        return name != "bias" and module.tp_size > 1
    if isinstance(module, ColumnParallelLinear):
        return module.tp_size > 1
    return isinstance(module, VocabParallelEmbedding)


def _owned_qkv(layer: Any, weight: torch.Tensor, tp_rank: int) -> Iterator[torch.Tensor]:
    queries = layer.num_heads * layer.head_size
    yield weight[:queries]
    if tp_rank % layer.num_kv_head_replicas == 0:
        yield weight[queries:]
