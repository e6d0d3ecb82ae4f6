"""A random Llama and a character tokenizer, small enough for every test."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

CHARACTERS = "0123456789,:"
SPECIAL = ["<pad>", "<bos>", "<eos>"]


def save_tiny_model(
    folder: Path, *, tied: bool = False, kv_heads: int = 2, positions: int = 128, seed: int = 0
) -> Path:
    """A model with 4 query heads and a vocabulary of 15, whose output is far from uniform."""
    torch.manual_seed(seed)
    LlamaForCausalLM(_config(tied, kv_heads, positions)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_tiny_reward_model(
    folder: Path,
    *,
    positions: int = 128,
    seed: int = 1,
    vocabulary: int = len(SPECIAL) + len(CHARACTERS),
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """A sequence classifier with one label, whose scores are far from equal; with the policy's tokenizer if None."""
    torch.manual_seed(seed)
    config = _config(tied=False, kv_heads=2, positions=positions, vocabulary=vocabulary)
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(folder)
    (tokenizer or character_tokenizer()).save_pretrained(folder)
    return folder


def _config(tied: bool, kv_heads: int, positions: int, vocabulary: int = len(SPECIAL) + len(CHARACTERS)) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        head_dim=32,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


character_tokenizer = tokenizer
