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
