"""The sizes of a model from which memory is predicted, read from the model without its weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rlhf_npu.config import ModelConfig
from rlhf_npu.edges import errors_as
from rlhf_npu.engines.model_fit import load_config, quiet
from rlhf_npu.errors import ModelError

FULL_ATTENTION = "full_attention"


@dataclass(frozen=True)
class Weight:
    """One parameter: its name in the model and its shape."""

    name: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class ModelShape:
    """What memory depends on.

    Attributes:
        weights: every parameter once; tied ones count as one.
        head: elements of the output layer that are not the embedding's, which a value model does not have.
        layers, hidden, heads, kv_heads, head_dim, vocabulary: as `config.json` has them.
        intermediate: width of the feed-forward part that one token goes through; for a mixture of experts, of all
            experts that it is sent to.
        gated: whether the feed-forward part has a gate beside its up projection.
        normed: numbers of one token that the norms of one layer see, those of queries and keys included.
        kv_elements: numbers that one token adds to the cache of one layer if the heads are not shared out.
        latent: whether that is a latent vector, which every device has whole, instead of keys and values by head.
        caching_layers: layers that keep something of each token.
        remembering_layers: those of them that keep it of all tokens, not of a window.
        caps_scores: whether attention caps its scores, which torch's kernels cannot.
    """

    weights: tuple[Weight, ...]
    head: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    intermediate: int
    gated: bool
    normed: int
    kv_elements: int
    latent: bool
    caching_layers: int
    remembering_layers: int
    caps_scores: bool

    @property
    def elements(self) -> int:
        """Parameters of the language model."""
        return sum(weight.elements for weight in self.weights)

    @property
    def largest(self) -> int:
        """Elements of the largest parameter."""
        return max(weight.elements for weight in self.weights)

    @property
    def value_elements(self) -> int:
        """Parameters of a value model made of this one: a linear head with one output stands for the language's."""
        return self.elements - self.head + self.hidden + 1

    def splits_over(self, devices: int) -> bool:
        """Whether the model's heads can be shared out over so many devices."""
        kv_heads_split = self.kv_heads % devices == 0 or devices % self.kv_heads == 0
        return self.heads % devices == 0 and self.intermediate % devices == 0 and kv_heads_split

    def cached_elements(self, tensor_parallel: int) -> int:
        """Numbers that one token adds to a layer's cache on one device; heads that are few are copied."""
        if self.latent:
            return self.kv_elements
        return self.kv_elements // self.kv_heads * max(1, self.kv_heads // tensor_parallel)


def model_shape(model: PreTrainedModel) -> ModelShape:
    """The shape of a causal language model or a sequence classifier, which may be on the meta device."""
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    weights = tuple(Weight(name, tuple(parameter.shape)) for name, parameter in model.named_parameters())
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    latent = getattr(config, "kv_lora_rank", None)
    kinds = list(getattr(config, "layer_types", None) or [FULL_ATTENTION] * config.num_hidden_layers)
    return ModelShape(
        weights=weights,
        head=0 if head is None or head.weight is embedding else head.weight.numel(),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocabulary=embedding.shape[0],
        intermediate=_width_of_a_token(config),
        gated=any("gate_proj" in weight.name or "gate_up_proj" in weight.name for weight in weights),
        normed=_normed(weights, config.num_attention_heads * head_dim, kv_heads * head_dim) or 2 * config.hidden_size,
        kv_elements=latent + config.qk_rope_head_dim if latent else 2 * kv_heads * head_dim,
        latent=bool(latent),
        caching_layers=len([kind for kind in kinds if "attention" in kind and "linear" not in kind]),
        remembering_layers=kinds.count(FULL_ATTENTION),
        caps_scores=bool(getattr(config, "attn_logit_softcapping", None)),
    )


def shape_of_folder(model: ModelConfig, key: str, kind: Any = AutoModelForCausalLM) -> ModelShape:
    """The shape of the model in a folder, of which only `config.json` is read.

    Args:
        kind: transformers' class for it.

    Raises:
        ModelError: transformers cannot build it.
    """
    with quiet():
        config = load_config(model, key)
        with errors_as(ModelError, f"{key}={model.path}: transformers cannot build this model"), torch.device("meta"):
            return model_shape(kind.from_config(config, trust_remote_code=model.trust_remote_code))


def _width_of_a_token(config: Any) -> int:
    experts = getattr(config, "num_experts_per_tok", None)
    dense = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    if not experts:
        return int(dense)
    width = getattr(config, "moe_intermediate_size", None) or dense
    shared = getattr(config, "shared_expert_intermediate_size", None) or 0
    shared += (getattr(config, "n_shared_experts", None) or 0) * width
    return int(experts * width + shared)


def _normed(weights: tuple[Weight, ...], queries: int, keys: int) -> int:
    layer = [weight for weight in weights if "norm" in weight.name and ".0." in weight.name]
    widths = {"q_norm": queries, "k_norm": keys}
    named = [next((width for name, width in widths.items() if name in weight.name), None) for weight in layer]
    return sum(width or weight.elements for weight, width in zip(layer, named, strict=True))
