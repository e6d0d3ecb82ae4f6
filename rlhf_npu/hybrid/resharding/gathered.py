"""The policy's whole weights, one bucket at a time, as DeepSpeed itself gathers them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch

from rlhf_npu.hybrid.resharding.checkpoint_names import Named


def gathered_buckets(
    policy: torch.nn.Module, bucket_bytes: int, only: Collection[str] | None = None
) -> Iterator[Named]:
    """Weights, of the names in `only` or all, in buckets of about `bucket_bytes`; each is valid until the next one.

    Under ZeRO-3 each bucket is gathered from all ranks, which therefore iterate together. Buffers that a checkpoint has
    (the bias of a router that is balanced without a loss) come first.
    """
    if buffers := [(name, buffer) for name, buffer in saved_buffers(policy) if only is None or name in only]:
        yield buffers
    parameters = [named for named in policy.named_parameters() if only is None or named[0] in only]
    for bucket in _cut(parameters, bucket_bytes):
        with _gathered([parameter for _, parameter in bucket]):
            yield [(name, parameter.detach()) for name, parameter in bucket]


def whole_weights(policy: torch.nn.Module, bucket_bytes: int, keep: bool) -> dict[str, torch.Tensor]:
    """Copies of all parameters in host memory, on ranks where `keep`; every rank calls this together."""
    weights: dict[str, torch.Tensor] = {}
    for bucket in gathered_buckets(policy, bucket_bytes):
        if keep:
            weights.update((name, tensor.to("cpu", copy=True)) for name, tensor in bucket)
    return weights


def saved_buffers(policy: torch.nn.Module) -> Named:
    """The buffers that a checkpoint of the policy has."""
    saved = policy.state_dict().keys()
    return [(name, buffer) for name, buffer in policy.named_buffers() if name in saved]


def shape_of(weight: torch.Tensor) -> torch.Size:
    """Of the whole weight, also where this rank has a part of it."""
    return torch.Size(getattr(weight, "ds_shape", weight.shape))


def is_partitioned(weight: torch.Tensor) -> bool:
    """Whether ZeRO-3 has cut the weight into one shard a rank."""
    return hasattr(weight, "ds_id")


def _cut(parameters: list[tuple[str, torch.nn.Parameter]], bucket_bytes: int) -> Iterator[list]:
    bucket: list[tuple[str, torch.nn.Parameter]] = []
    size = 0
    for name, parameter in parameters:
        parameter_bytes = shape_of(parameter).numel() * parameter.element_size()
        if bucket and size + parameter_bytes > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, parameter))
        size += parameter_bytes
    if bucket:
        yield bucket


def _gathered(parameters: list[torch.nn.Parameter]) -> AbstractContextManager[None]:
    if not any(is_partitioned(parameter) for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)
