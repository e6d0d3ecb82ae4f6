"""What a DeepSpeed engine keeps on the device between steps, moved into tags of the sleep pool.

DeepSpeed makes its states where it likes, and views of them everywhere. So each storage stays the object that it is:
its memory is given back and taken again inside the tag's region, and whatever views it follows.

| tag | holds |
| --- | --- |
| `<role>.params` | buffers, and parameters or what ZeRO made of them: flat copies, shards |
| `<role>.optimizer` | this rank's float32 masters, which in float32 at ZeRO 0 are the parameters, and Adam's moments |
| `<role>.grads` | ZeRO 3's partitioned gradients and its bucket; below ZeRO 3 no gradient outlives a step |
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from allocator import HookError, SleepPool
from rlhf_npu.engines.shared_storage import SharedStorage

AT_ONCE = 1 << 30  # bytes that are copied aside while their memory changes hands; a larger storage goes alone


@dataclass(frozen=True)
class States:
    """The tensors that hold an engine's memory between steps; those of one list may share a storage."""

    params: list[torch.Tensor]
    grads: list[torch.Tensor]
    optimizer: list[torch.Tensor]


def place(module: torch.nn.Module, device: torch.device, tag: str | None) -> torch.nn.Module:
    """`module` on `device`, in memory that can be moved into a tag; outside of the pool if `tag` is None.

    On the CPU `Module.to` copies nothing: parameters would stay in a mapped file, and ZeRO 3's shards in memory that
    torch may have made before the pool's first region, with an allocator that the pool never sees. Neither can change
    hands.
    """
    if tag is None or device.type != "cpu":
        return module.to(device)
    shards = [parameter.ds_tensor for parameter in module.parameters() if hasattr(parameter, "ds_tensor")]
    with SleepPool.get(device).region(tag):
        for tensor in (*module.parameters(), *shards, *module.buffers()):
            tensor.data = tensor.data.to(device, copy=True)
    return module


def own_trainer(engine: Any, role: str, storage: SharedStorage | None = None) -> tuple[str, ...]:
    """Move all states of a DeepSpeed engine that trains into tags, and make Adam's moments there.

    Args:
        storage: holds its parameters already, under the tag in which they belong.

    Returns:
        the tags that hold memory.

    Raises:
        HookError: a state's memory could not be had from the pool.
    """
    pool = SleepPool.get(engine.device)
    for master in masters(engine):
        master.grad = None  # ZeRO 3 leaves one as large as the largest group of unpartitioned parameters
    states = states_of(engine)
    own(pool, f"{role}.params", _outside(storage, states.params))
    own(pool, f"{role}.grads", states.grads)
    own(pool, f"{role}.optimizer", states.optimizer)
    with pool.region(f"{role}.optimizer"):  # last: what is copied aside of the others might not fit beside moments
        make_moments(engine.basic_optimizer, masters(engine))
    pool.trim()
    grads = (f"{role}.grads",) if states.grads else ()
    return (f"{role}.params", *grads, f"{role}.optimizer")


def _outside(storage: SharedStorage | None, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Those that are not in `storage`, whose address must not change."""
    if storage is None:
        return tensors
    return [tensor for tensor in tensors if not storage.holds(tensor)]


def own_module(module: torch.nn.Module, device: torch.device, role: str) -> tuple[str, ...]:
    """Move the weights of a frozen model, whole or partitioned by ZeRO 3, into the tag `<role>.params`; returns it.

    Raises:
        HookError: a weight's memory could not be had from the pool.
    """
    pool = SleepPool.get(device)
    own(pool, f"{role}.params", _weights(module))
    pool.trim()
    return (f"{role}.params",)


def states_of(engine: Any) -> States:
    """What a DeepSpeed engine that trains holds now; Adam's moments as far as there are any."""
    params = _weights(engine.module)
    addresses = {storage.data_ptr() for storage in _storages(params)}
    optimizer = [*masters(engine), *_moments(engine.basic_optimizer)]
    return States(
        params=params,
        grads=gradient_buffers(engine),
        optimizer=[tensor for tensor in optimizer if tensor.untyped_storage().data_ptr() not in addresses],
    )


def masters(engine: Any) -> list[torch.Tensor]:
    """What the optimizer updates: float32, this rank's part; in float32 at ZeRO 0 the parameters themselves."""
    if engine.zero_optimization_stage() == 3:  # ZeRO 3 shows its optimizer one group at a time
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [parameter for group in engine.basic_optimizer.param_groups for parameter in group["params"]]


def gradient_buffers(engine: Any) -> list[torch.Tensor]:
    """Memory for gradients that DeepSpeed keeps between steps: all gradients first, then the bucket they go through."""
    if engine.zero_optimization_stage() < 3:
        return []
    optimizer = engine.optimizer
    buckets = [bucket.buffer for bucket in optimizer.ipg_buckets.values() if bucket.buffer is not None]
    return [optimizer.grad_partitions_flat_buffer, *buckets]


def clear_gradients(engine: Any) -> None:
    """Set the gradients that ZeRO 3 keeps to zero.

    A step leaves its own there, a sleep anything, and a backward pass writes only those of parameters that it reached.
    """
    for gradients in gradient_buffers(engine)[:1]:
        gradients.zero_()


def release_gathered(optimizer: Any) -> None:
    """Partition all that ZeRO 3 holds gathered; the next pass gathers it again. Not a collective."""
    offload = getattr(optimizer, "parameter_offload", optimizer)
    if hasattr(offload, "partition_all_parameters"):
        offload.partition_all_parameters()


def make_moments(optimizer: torch.optim.Optimizer, parameters: Iterable[torch.Tensor]) -> None:
    """Give Adam the state that its first step would make, where it has none yet."""
    (fused,) = {bool(group["fused"]) for group in optimizer.param_groups}
    for parameter in parameters:
        if not optimizer.state[parameter]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device if fused else "cpu"),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }


def own(pool: SleepPool, tag: str, tensors: Iterable[torch.Tensor]) -> None:
    """Move the memory behind `tensors` under `tag`; contents stay, addresses change, views follow.

    Raises:
        HookError: the memory was not had from the pool: the storage's allocator is one that the pool does not see.
    """
    moved = 0
    for storages in _portions(_storages(tensors)):
        _move(pool, tag, storages)
        moved += sum(storage.nbytes() for storage in storages)
    if moved and (held := held_bytes(pool, tag)) < moved:
        raise HookError(
            f"{moved} bytes were to move into {tag!r}, which holds {held}: torch had made the others before the pool's "
            "first region",
            tag=tag,
            phase="region",
        )


def held_bytes(pool: SleepPool, tag: str) -> int:
    """Bytes of the tensors of a tag that is awake, without what torch or the pool rounded up."""
    stats = pool.stats()[tag]
    return stats.mapped - stats.dead


def _move(pool: SleepPool, tag: str, storages: list[torch.UntypedStorage]) -> None:
    sizes = [storage.nbytes() for storage in storages]
    contents = [_bytes_of(storage).clone() for storage in storages]
    for storage in storages:
        storage.resize_(0)
    with pool.region(tag):
        for storage, size in zip(storages, sizes, strict=True):
            storage.resize_(size)
    for storage, content in zip(storages, contents, strict=True):
        _bytes_of(storage).copy_(content)


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _portions(storages: Iterable[torch.UntypedStorage]) -> Iterator[list[torch.UntypedStorage]]:
    portion: list[torch.UntypedStorage] = []
    for storage in storages:
        if portion and sum(other.nbytes() for other in portion) + storage.nbytes() > AT_ONCE:
            yield portion
            portion = []
        portion.append(storage)
    if portion:
        yield portion


def _storages(tensors: Iterable[torch.Tensor]) -> list[torch.UntypedStorage]:
    """Each storage that holds something, once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return list({storage.data_ptr(): storage for storage in storages if storage.nbytes()}.values())


def _weights(module: torch.nn.Module) -> list[torch.Tensor]:
    """Parameters, or under ZeRO 3 this rank's shards of them, and buffers."""
    parameters = [getattr(parameter, "ds_tensor", parameter) for parameter in module.parameters()]
    return [*parameters, *module.buffers()]


def _moments(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    values = [value for state in optimizer.state.values() for value in state.values()]
    return [value for value in values if isinstance(value, torch.Tensor) and value.dim()]
