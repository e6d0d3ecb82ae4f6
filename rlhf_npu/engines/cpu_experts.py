"""Let vLLM's CPU pack a mixture's experts each time that they are loaded, not the first time only."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

_MARK = "packs_each_load"


def pack_experts_at_each_load() -> None:
    """Make the experts' weights that `load_weights` or `reload_weights` brings those that the kernel computes with.

    On the CPU the kernel packs the experts when it is made, which vLLM does once; weights loaded later would be read in
    the wrong order.
    """
    method = UnquantizedFusedMoEMethod
    if hasattr(method, _MARK):
        return
    setattr(method, _MARK, True)
    process = method.process_weights_after_loading

    def process_weights_after_loading(self: Any, layer: Any) -> None:
        kernel, quant_config = self.moe_kernel, self.moe_quant_config
        self.moe_kernel = None
        process(self, layer)
        if kernel is not None:  # what the first one was given stays valid, since the weights stay where they are
            self.moe_kernel, self.moe_quant_config = kernel, quant_config

    method.process_weights_after_loading = process_weights_after_loading
