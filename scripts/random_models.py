"""Models of a given shape with random weights, for measurements that need no trained ones."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from rlhf_npu.preflight.tiny_models import tokenizer

HEAD = 128


def save_random_qwen2(folder: Path, layers: int, hidden: int, vocabulary: int, device: torch.device) -> Path:
    """A Qwen2 in bfloat16, made on `device`, with the proportions of the 7B: 28 layers of 3584 are that.

    Args:
        hidden: a multiple of 128, the size of a head; there is one key-value head for seven heads, or fewer.
    """
    heads = hidden // HEAD
    config = transformers.Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 37 // 7 // HEAD * HEAD,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 7 if heads % 7 == 0 else heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
