"""References of what reads and writes the paged cache of keys and values."""

from __future__ import annotations

from torch import Tensor

from simulated_npu.references import reference


@reference("atb::_npu_reshape_and_cache")
def reshape_and_cache(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_indices: Tensor) -> None:
    """Writes each token's key and value to its slot, slot // block size being the block; negative slots are skipped.

    key, value [tokens, heads, head size]; caches [blocks, block size, heads, head size]; slot_indices [tokens].
    vllm-ascend, device/device_op.py, BaseDeviceAdaptor.reshape_and_cache.
    """
    if slot_indices.shape[0] != key.shape[0]:
        raise ValueError(
            f"atb::_npu_reshape_and_cache: {key.shape[0]} tokens, and slots for {slot_indices.shape[0]} of them"
        )
    kept = slot_indices >= 0
    slots = slot_indices[kept].long()
    for new, cache in ((key, key_cache), (value, value_cache)):
        cache.view(-1, *cache.shape[2:])[slots] = new[kept].view(-1, *cache.shape[2:])


def gathered(cache: Tensor, blocks: Tensor, length: int, heads: int) -> Tensor:
    """The first `length` tokens of a sequence as [length, heads, head size], from a cache [blocks, block size, ...]."""
    block_size = cache.shape[1]
    used = blocks[: -(-length // block_size)].long()
    return cache[used].reshape(used.shape[0] * block_size, heads, -1)[:length]
