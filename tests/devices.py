"""Which device the tests run on: an NPU where torch_npu is installed, be it a simulated one."""

from __future__ import annotations

import importlib.util

import torch

from rlhf_npu.platform import CPU, NPU


def _device() -> str:
    if importlib.util.find_spec("torch_npu") is not None:
        return "npu"
    return "cuda" if torch.cuda.is_available() else "cpu"


DEVICE = _device()
# Of tests that start ranks: beside a GPU they stay on the CPU, since there may be fewer GPUs than ranks.
PLATFORM = NPU if DEVICE == "npu" else CPU
