"""Reductions of statistics over all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist

SUM = dist.ReduceOp.SUM
MAX = dist.ReduceOp.MAX


def all_reduce(tensor: torch.Tensor, operation: dist.ReduceOp.RedOpType = SUM) -> torch.Tensor:
    """`tensor` reduced over all ranks, which call this together; the argument stays as it is.

    HCCL has no float64, so on an NPU the reduction is float32's.
    """
    on_npu = tensor.device.type == "npu" and tensor.dtype == torch.float64
    reduced = tensor.float() if on_npu else tensor.clone()
    dist.all_reduce(reduced, op=operation)
    return reduced.to(tensor.dtype)


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """The one-dimensional `tensor` of each rank, of equal length on all, joined in the order of ranks."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)
