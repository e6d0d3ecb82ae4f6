"""Keep the weights of vLLM's CPU models where, and as, `load_weights` and `reload_weights` can replace them.

On the CPU vLLM packs weights for its kernels once, when the model is loaded: later ones would not arrive, or be read
in the wrong order.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers import utils as vllm_layers
from vllm.model_executor.layers.attention.mla_attention import MLAAttention
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

_MARK = "takes_new_weights"


def make_cpu_weights_updatable() -> None:
    """Change vLLM's CPU layers, once in a process, so that their weights can be loaded again and again."""
    vllm_layers.dispatch_cpu_unquantized_gemm = _compute_from_parameter
    if not hasattr(MLAAttention, _MARK):
        setattr(MLAAttention, _MARK, True)
        MLAAttention.process_weights_after_loading = _keeping_projection(MLAAttention.process_weights_after_loading)
        method = UnquantizedFusedMoEMethod
        method.process_weights_after_loading = _packing_each_time(method.process_weights_after_loading)


def _compute_from_parameter(layer: Any, remove_weight: bool) -> None:
    """vLLM would repack the weight of a linear layer, and throw the parameter away."""
    del remove_weight  # the parameter is the only copy
    layer.cpu_linear = torch.nn.functional.linear


def _packing_each_time(process: Any) -> Any:
    """vLLM packs experts when it makes their kernel, which it does at the first load only."""

    def process_weights_after_loading(self: Any, layer: Any) -> None:
        kernel, quant_config = self.moe_kernel, self.moe_quant_config
        self.moe_kernel = None
        try:
            process(self, layer)
        finally:
            if kernel is not None:  # what the first one was given stays valid, since the weights stay where they are
                self.moe_kernel, self.moe_quant_config = kernel, quant_config

    return process_weights_after_loading


def _keeping_projection(process: Any) -> Any:
    """With AMX vLLM drops the projection that latent keys and values come from, once it has packed parts of it."""

    def process_weights_after_loading(self: Any, act_dtype: torch.dtype) -> None:
        weight = self.kv_b_proj.weight
        try:
            process(self, act_dtype)
        finally:
            self.kv_b_proj.weight = weight

    return process_weights_after_loading
