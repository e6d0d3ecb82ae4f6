"""Keep vLLM's CPU linear weights where `load_weights` can reach them."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers import utils as vllm_layers


def keep_linear_weights() -> None:
    """Make vLLM's CPU linear layers compute from their parameter.

    By default vLLM repacks each weight for the CPU's matrix kernels and throws the parameter away, so a second
    `load_weights` fails. A policy's weights change every step, so they stay in place here.
    """
    vllm_layers.dispatch_cpu_unquantized_gemm = _dispatch_to_parameter


def _dispatch_to_parameter(layer: Any, remove_weight: bool) -> None:
    del remove_weight  # the parameter is the only copy
    layer.cpu_linear = torch.nn.functional.linear
