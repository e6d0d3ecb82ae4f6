"""Load policies, critics and tokenizers from Hugging Face folders; write a policy back."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_npu.config import ModelConfig
from rlhf_npu.edges import errors_as
from rlhf_npu.engines.attention import attention_implementation
from rlhf_npu.engines.dropout import noise_as_configured, switch_off_noise
from rlhf_npu.engines.model_folder import GENERATION_CONFIG, declared_stop_ids
from rlhf_npu.engines.model_loading import Place, place_for, place_rest, placing
from rlhf_npu.errors import ModelError, SaveError
from rlhf_npu.platform import detect_platform

HOST = torch.device("cpu")


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model; EOS stands in for a missing padding token.

    Raises:
        ModelError: transformers cannot load it, or it has no EOS token.
    """
    tokenizer = read_tokenizer(model)
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer in {model.path!r} has no EOS token; responses could never finish")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model, as it is.

    Raises:
        ModelError: transformers cannot load it.
    """
    with errors_as(ModelError, f"the tokenizer in {model.path!r} cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ModelError(f"{model.path!r} holds no tokenizer; save one there with save_pretrained")
    return tokenizer


def stop_token_ids(model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a response: the tokenizer's EOS and those of the model's generation config."""
    return sorted({tokenizer.eos_token_id, *declared_stop_ids(Path(model.path))})


def load_policy(model: ModelConfig, *, zero_stage: int = 0, device: torch.device = HOST) -> PreTrainedModel:
    """A causal language model in `model.dtype` on `device`; for ZeRO-3 only this rank's shards of it.

    Under ZeRO-3 all ranks call this together.
    """
    place = place_for(zero_stage, getattr(torch, model.dtype), device)
    policy = _read(AutoModelForCausalLM, model, place)
    place_rest(policy, place, device)
    return policy


class ValueModel(torch.nn.Module):
    """A language model's trunk with a linear head: one value for each position."""

    def __init__(self, trunk: PreTrainedModel) -> None:
        super().__init__()
        self.trunk = trunk
        self.value_head = torch.nn.Linear(trunk.config.hidden_size, 1, dtype=trunk.dtype)
        # A critic that starts at zero makes the first advantages the plain returns.
        torch.nn.init.zeros_(self.value_head.weight)
        torch.nn.init.zeros_(self.value_head.bias)

    def forward(self, **inputs: Any) -> torch.Tensor:
        """Values (B, T) of the positions of `input_ids` (B, T)."""
        hidden = self.trunk(**inputs, use_cache=False).last_hidden_state
        return self.value_head(hidden).squeeze(-1)


def load_critic(model: ModelConfig, *, zero_stage: int = 0, device: torch.device = HOST) -> ValueModel:
    """A critic whose trunk is the model in `model.path`; where it is, and how it is cut, as with `load_policy`."""
    place = place_for(zero_stage, getattr(torch, model.dtype), device)
    critic = ValueModel(_read(AutoModel, model, place))
    place_rest(critic, place, device)
    return critic


def load_reward_model(model: ModelConfig, *, zero_stage: int = 0, device: torch.device = HOST) -> PreTrainedModel:
    """A sequence classifier with one label, its head new unless the folder has one; placed as by `load_policy`."""
    place = place_for(zero_stage, getattr(torch, model.dtype), device)
    classifier = _read(AutoModelForSequenceClassification, model, place, num_labels=1)
    classifier.config.pad_token_id = load_tokenizer(model).pad_token_id  # by which transformers finds the last token
    place_rest(classifier, place, device)
    return classifier


def save_policy(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: dict[str, torch.Tensor],
    folder: Path,
) -> None:
    """Write `weights` in Hugging Face format; `folder` appears whole or not at all.

    Raises:
        SaveError: it could not be written; names the folder with what was written.
    """
    partial = folder.with_name(folder.name + ".partial")
    with errors_as(SaveError, f"the policy could not be saved as {folder}; what was written of it is in {partial}"):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        # What is saved is the file that came with the model; this one only has to pass transformers' checks.
        policy.generation_config = GenerationConfig.from_dict(
            {name: getattr(policy.config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        )
        with noise_as_configured(policy):
            policy.save_pretrained(partial, state_dict=weights)
            save_surroundings(policy.config, tokenizer, Path(policy.name_or_path), partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)


def save_surroundings(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, source: Path, folder: Path) -> None:
    """Write what a model folder holds beside the weights: the generation config and code as they are in `source`."""
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in (source / GENERATION_CONFIG, *source.glob("*.py")):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)


def _arguments(model: ModelConfig) -> dict[str, Any]:
    config = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    return {
        "dtype": getattr(torch, model.dtype),
        "trust_remote_code": model.trust_remote_code,
        "attn_implementation": attention_implementation(model.attn_implementation, config),
        "experts_implementation": _experts_implementation(),
    }


def _experts_implementation() -> str | None:
    """transformers' choice; on an NPU one expert after the other.

    torch_npu 2.10 has no grouped matrix product: torch would copy all experts to the host for each.
    """
    return "eager" if detect_platform().name == "npu" else None


def _read(kind: Any, model: ModelConfig, place: Place, **more: Any) -> PreTrainedModel:
    with placing(place):
        module: PreTrainedModel = kind.from_pretrained(model.path, **_arguments(model), **more)
    switch_off_noise(module)
    if model.enable_gradient_checkpointing:
        module.gradient_checkpointing_enable({"use_reentrant": False})
    return module
