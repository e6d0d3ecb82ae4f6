"""Tiny random models of each family that transformers and vLLM know, with a tokenizer of characters."""

from __future__ import annotations

import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<bos>", "<eos>")
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'][0] + '>' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
)
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
COMMON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    **IDS,
}
HEAD = {"head_dim": 32}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    **EXPERTS,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 512,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 128,
    },
}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}


@dataclass(frozen=True)
class Family:
    """A family of models: its name, transformers' class of its configuration, and what that is given."""

    name: str
    config_class: str
    arguments: dict[str, Any]

    @property
    def dtype(self) -> str:
        """vLLM's attention with latent keys has no float32 on the CPU."""
        return "bfloat16" if "kv_lora_rank" in self.arguments else "float32"

    def save(self, folder: Path, seed: int = 0) -> Path:
        """Write a random model of about 100,000 parameters, and its tokenizer, into `folder`."""
        torch.manual_seed(seed)
        config = getattr(transformers, self.config_class)(**self.arguments)
        model = AutoModelForCausalLM.from_config(config).to(getattr(torch, self.dtype))
        model.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        return folder


def _family(name: str, config_class: str, *arguments: dict[str, Any], **more: Any) -> Family:
    merged: dict[str, Any] = dict(COMMON)
    for part in (*arguments, more):
        merged |= part
    return Family(name, config_class, merged)


GPT2 = {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 512, "initializer_range": 0.1, **IDS}
OPT = {"ffn_dim": 96, "word_embed_proj_dim": 64, "num_attention_heads": 2, "init_std": 0.1}
CAPPED = {"query_pre_attn_scalar": 32, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}
FAMILIES = {
    family.name: family
    for family in (
        _family("Llama", "LlamaConfig", HEAD),
        _family("Llama, tied", "LlamaConfig", HEAD, tie_word_embeddings=True),
        _family("Llama, with dropout", "LlamaConfig", HEAD, attention_dropout=0.1),
        _family("Qwen2", "Qwen2Config", num_attention_heads=2, tie_word_embeddings=True),
        _family("Qwen2.5", "Qwen2Config", num_attention_heads=2, rms_norm_eps=1e-6),
        _family("Qwen3", "Qwen3Config", HEAD, tie_word_embeddings=True),
        _family("Qwen3-MoE", "Qwen3MoeConfig", HEAD, EXPERTS, num_experts=4, decoder_sparse_step=1),
        _family("Mixtral", "MixtralConfig", HEAD, num_local_experts=4, num_experts_per_tok=2),
        _family("Mistral", "MistralConfig", HEAD, sliding_window=16),
        _family("Gemma 2", "Gemma2Config", HEAD, CAPPED, sliding_window=16),
        _family("Gemma 3", "Gemma3TextConfig", HEAD, LAYERS, query_pre_attn_scalar=32),
        _family("Phi-3", "Phi3Config", num_attention_heads=2),
        Family("GPT-2", "GPT2Config", GPT2),
        _family("GPT-NeoX", "GPTNeoXConfig", num_attention_heads=2),
        _family("OLMo 2", "Olmo2Config", num_attention_heads=2),
        _family("Granite", "GraniteConfig", num_attention_heads=2, logits_scaling=2.0, attention_multiplier=0.1),
        _family("GLM-4", "Glm4Config", HEAD),
        _family("DeepSeek-V2", "DeepseekV2Config", LATENT, topk_method="group_limited_greedy"),
        _family("DeepSeek-V3", "DeepseekV3Config", LATENT, topk_method="noaux_tc", scoring_func="sigmoid"),
        _family("OPT", "OPTConfig", OPT),
        _family("SmolLM3", "SmolLM3Config", num_attention_heads=2),
        _family("gpt-oss", "GptOssConfig", HEAD, LAYERS, num_local_experts=4, num_experts_per_tok=2),
        _family("GLM-4-MoE", "Glm4MoeConfig", HEAD, EXPERTS, n_routed_experts=4, first_k_dense_replace=1),
        _family("Qwen2-MoE", "Qwen2MoeConfig", EXPERTS, num_attention_heads=2, num_experts=4),
        _family("OLMoE", "OlmoeConfig", num_attention_heads=2, num_experts=4, num_experts_per_tok=2),
        _family("Phi", "PhiConfig", num_attention_heads=2),
        _family("StarCoder 2", "Starcoder2Config", num_attention_heads=2),
        _family("StableLM", "StableLmConfig", num_attention_heads=2),
        _family("Falcon", "FalconConfig", num_attention_heads=2, new_decoder_architecture=True, num_kv_heads=2),
        _family("Cohere", "CohereConfig", num_attention_heads=2, tie_word_embeddings=True),
    )
}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    backend = Tokenizer(
        models.BPE(vocab={token: index for index, token in enumerate((*SPECIAL, *string.printable))}, merges=[])
    )
    backend.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    made.chat_template = TEMPLATE
    return made
