"""Models over packed rows: a trunk once, and only the places that are trained or scored through a head."""

from __future__ import annotations

import torch
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from rlhf_npu.algorithms.token_probs import log_probs_from_logits
from rlhf_npu.data.packing import PackedBatch
from rlhf_npu.engines.attention import AUTO
from rlhf_npu.engines.packed_attention import PackedAttention, name_of
from rlhf_npu.errors import ModelError
from rlhf_npu.platform import Platform, detect_platform

CHUNK = 2048
"""Trained tokens whose logits exist at a time."""


class PackedModel(torch.nn.Module):
    """A causal language model over packed rows.

    Attributes:
        model: the language model, whose parameters are all of this module's.
        attention: how it keeps sequences apart.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        attention: str = AUTO,
        shares_prompts: bool = True,
        platform: Platform | None = None,
    ) -> None:
        """Wrap `model`, and set its attention to what suits packed rows.

        Args:
            attention: `attn_implementation` of the model's configuration.
            shares_prompts: whether completions may share a prompt; without, faster attention can be used.
            platform: where the model is; this machine's if None.

        Raises:
            ModelError: the model cannot be packed as far as its configuration tells, or has an unknown head.
        """
        super().__init__()
        self.model = model
        self.attention = PackedAttention(model, attention, platform or detect_platform(), shares_prompts=shares_prompts)
        self.head = VocabularyHead(model)
        _trunk(model)

    def forward(self, batch: PackedBatch, chunk: int = CHUNK) -> torch.Tensor:
        """Log-probabilities (K,) float32 of the batch's targets.

        Args:
            chunk: trained tokens whose logits exist at a time; ranks may have any numbers of chunks.
        """
        return self.head(_hidden(self.model, self.attention, batch)[batch.source], batch.target, chunk)

    def alone(self, prompt: torch.Tensor, completion: torch.Tensor) -> torch.Tensor:
        """Log-probabilities (C,) of a completion behind its prompt, by the model's own forward pass."""
        ids = torch.cat([prompt, completion])[None]
        logits = self.model(input_ids=ids, use_cache=False).logits[:, len(prompt) - 1 : -1]
        return log_probs_from_logits(logits, completion[None])[0]


class VocabularyHead(torch.nn.Module):
    """A model's output embeddings, over chunks of tokens.

    Called once a forward pass, so that ZeRO-3 gathers the weight once, and on all ranks alike, whatever the number of
    chunks: the weight is a parameter of this module too.
    """

    bias: torch.Tensor | None

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        output = model.get_output_embeddings()
        if type(output) is not torch.nn.Linear:
            raise ModelError(
                f"{name_of(model)} has output embeddings of {type(output).__name__}; they must be a plain Linear"
            )
        self.weight = output.weight
        self.register_parameter("bias", output.bias)
        config = model.config.get_text_config()
        self._scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        self._cap = getattr(config, "final_logit_softcapping", None)

    def forward(self, hidden: torch.Tensor, target: torch.Tensor, chunk: int) -> torch.Tensor:
        """Log-probabilities (K,) float32 of `target` (K,) given `hidden` (K, H).

        The backward pass computes the logits again, one chunk after the other.
        """
        parts = zip(hidden.split(chunk), target.split(chunk), strict=True)
        return torch.cat(
            [checkpoint(self._log_probs, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        )

    def _log_probs(self, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = linear(hidden, self.weight, self.bias)
        if self._scale != 1.0:
            logits = logits * self._scale
        if self._cap:
            logits = torch.tanh(logits / self._cap) * self._cap
        if not len(target):  # a row that trains nothing still takes part in ZeRO-3's collectives
            return logits.float().sum(-1)
        return log_probs_from_logits(logits[None], target[None])[0]


class PackedScores(torch.nn.Module):
    """A reward model over packed rows: a sequence classifier with one label, read at each completion's last token.

    Attributes:
        model: the classifier.
        attention: how it keeps sequences apart.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        attention: str = AUTO,
        shares_prompts: bool = True,
        platform: Platform | None = None,
    ) -> None:
        """Wrap `model`; arguments and errors as those of `PackedModel`."""
        super().__init__()
        if not isinstance(getattr(model, "score", None), torch.nn.Module) or model.config.num_labels != 1:
            raise ModelError(
                f"{name_of(model)} is no sequence classifier with one label and a head named score: "
                f"it is a {type(model).__name__} with num_labels={getattr(model.config, 'num_labels', None)}"
            )
        self.model = model
        self.attention = PackedAttention(model, attention, platform or detect_platform(), shares_prompts=shares_prompts)
        _trunk(model)

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Scores (R,) float32 of the batch's completions."""
        hidden = _hidden(self.model, self.attention, batch)
        return self.model.score(hidden[batch.last]).squeeze(-1).float()

    def alone(self, prompt: torch.Tensor, completion: torch.Tensor) -> torch.Tensor:
        """The score (1,) of a completion behind its prompt, by the model's own forward pass."""
        ids = torch.cat([prompt, completion])[None]
        return self.model(input_ids=ids, use_cache=False).logits[:, 0].float()


def _hidden(model: PreTrainedModel, attention: PackedAttention, batch: PackedBatch) -> torch.Tensor:
    """The trunk's last hidden states (N, H)."""
    outputs = _trunk(model)(
        input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **attention.inputs(batch)
    )
    return outputs.last_hidden_state[0]


def _trunk(model: PreTrainedModel) -> torch.nn.Module:
    trunk: torch.nn.Module = model.base_model
    if trunk is model:
        raise ModelError(f"{name_of(model)} has no trunk apart from its head")
    return trunk
