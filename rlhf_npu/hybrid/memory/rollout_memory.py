"""Bytes of the rollout on one device: vLLM's shard of the weights, its KV cache, and what a pass takes beside them.

The shards are those of Shoeybi et al. 2019 ("Megatron-LM", section 3) as vLLM 0.23 and 0.32 cut them: matrices over
devices, norms and routers whole on each, vocabularies padded to a multiple of 64.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_npu.hybrid.memory.model_shape import ModelShape, Weight

GIB = 1 << 30
VOCABULARY_UNIT = 64
CACHE_BLOCK = 16
"""Tokens of a block of the cache, at least."""
FLOAT32 = 4
COPIES_OF_LOGITS = 3
"""Of what sampling computes in float32: the logits, their scaled copy and its log-softmax."""
LARGE_DEVICE = 70 * GIB
"""From here on vLLM lets a pass have twice as many tokens (`EngineArgs.get_batch_defaults`)."""


@dataclass(frozen=True)
class RolloutDemand:
    """What is asked of one rollout engine.

    Attributes:
        tensor_parallel: devices that share it.
        item_bytes: of a weight and of a number in the cache.
        sequences: generated at the same time at most.
        length: tokens of a sequence at most.
    """

    tensor_parallel: int
    item_bytes: int
    sequences: int
    length: int


def weight_bytes(shape: ModelShape, demand: RolloutDemand) -> int:
    """Bytes of the weights on one device."""
    return sum(_shard(weight, shape, demand.tensor_parallel) for weight in shape.weights) * demand.item_bytes


def least_cache_bytes(shape: ModelShape, demand: RolloutDemand) -> int:
    """Bytes of a cache that holds one sequence of the full length: with less vLLM does not start."""
    return shape.remembering_layers * _layer_cache_bytes(shape, demand)


def useful_cache_bytes(shape: ModelShape, demand: RolloutDemand) -> int:
    """Bytes of a cache that holds as many sequences of the full length as are generated at the same time."""
    return demand.sequences * shape.caching_layers * _layer_cache_bytes(shape, demand)


def generation_bytes(shape: ModelShape, demand: RolloutDemand, device_memory: int) -> int:
    """The peak of one pass with as many tokens as vLLM lets a pass have, and of sampling after it."""
    tokens = min(demand.sequences * demand.length, 16384 if device_memory >= LARGE_DEVICE else 8192)
    wide = (3 if shape.gated else 2) * shape.intermediate // demand.tensor_parallel
    attention = 4 * shape.heads * shape.head_dim // demand.tensor_parallel
    in_layer = (max(wide, attention) + 4 * shape.hidden) * demand.item_bytes * tokens
    sampled = demand.sequences * shape.vocabulary * (demand.item_bytes + COPIES_OF_LOGITS * FLOAT32)
    return max(in_layer, sampled + shape.hidden * demand.item_bytes * tokens)


def _layer_cache_bytes(shape: ModelShape, demand: RolloutDemand) -> int:
    tokens = -(-demand.length // CACHE_BLOCK) * CACHE_BLOCK
    return tokens * shape.cached_elements(demand.tensor_parallel) * demand.item_bytes


def _shard(weight: Weight, shape: ModelShape, tensor_parallel: int) -> int:
    """Elements of a parameter on one device."""
    if len(weight.shape) < 2 or _is_whole(weight):
        return weight.elements
    if weight.shape[0] == shape.vocabulary:
        padded = -(-shape.vocabulary // VOCABULARY_UNIT) * VOCABULARY_UNIT
        return padded // tensor_parallel * (weight.elements // shape.vocabulary)
    if any(name in weight.name for name in ("k_proj", "v_proj")):
        return weight.elements // min(tensor_parallel, shape.kv_heads)
    return weight.elements // tensor_parallel


def _is_whole(weight: Weight) -> bool:
    """Routers, learned positions and projections into a latent space are whole on each device."""
    names = (".gate.weight", ".router.", "wpe", "embed_positions", "kv_a_proj", "q_a_proj", "shared_expert_gate")
    return any(name in weight.name for name in names)
