"""Small tokenizers with merges, and chat templates as models bring them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' "
    "+ m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
INST = (  # no generation prompt: what the user says ends with its beginning
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% else %}{{ m.content + '\n' }}{% endif %}"
    "{% endfor %}"
)
THINKING = (  # leaves out what the assistant thought in turns before the last
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and not loop.last %}"
    "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REASONING = (  # as DeepSeek-R1's: asks for thoughts, which it leaves out of what was said
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content.split('</think>')[-1] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
TOOLS = "{% if tools %}{{ tools | tojson }}\n{% endif %}" + CHATML
SPECIAL = (
    *("<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)
TEXTS = (
    "What is one plus two? It is three.\n\nWhat is it then? Three!\n\n\n",
    "assistant\n\nsystem\n\nuser\n\n  indented  text   with spaces \n \n",
) * 4


def byte_level(template: str | None = None, eos: str = "<eos>", **settings: Any) -> PreTrainedTokenizerBase:
    """A byte-level BPE as GPT-2's, whose merges join line ends and spaces."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    return _wrapped(backend, template, eos, **settings)


def metaspace(bos: bool = True, eos: bool = False) -> PreTrainedTokenizerBase:
    """A BPE as Llama 2's, which begins every text with a space; with BOS and EOS around it if wanted."""
    backend = Tokenizer(models.BPE(unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=list(SPECIAL), show_progress=False)
    backend.train_from_iterator([*TEXTS, "x=0123456789"], trainer)
    around = f"{'<bos> ' if bos else ''}$A{' <eos>' if eos else ''}"
    backend.post_processor = processors.TemplateProcessing(
        single=around, special_tokens=[(token, backend.token_to_id(token)) for token in ("<bos>", "<eos>")]
    )
    return _wrapped(backend, None, "<eos>")


def _wrapped(backend: Tokenizer, template: str | None, eos: str, **settings: Any) -> PreTrainedTokenizerBase:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token=eos, **settings
    )
    tokenizer.chat_template = template
    return tokenizer


def write_lines(path: Path, *records: Any) -> str:
    """Records as JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)
