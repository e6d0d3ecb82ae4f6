"""Models on the meta device, and their shapes."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from rlhf_npu.hybrid.memory.model_shape import ModelShape, model_shape

QWEN2_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}


def without_weights(config: Any) -> PreTrainedModel:
    """A causal language model on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def qwen2_7b() -> ModelShape:
    return model_shape(without_weights(Qwen2Config(**QWEN2_7B)))
