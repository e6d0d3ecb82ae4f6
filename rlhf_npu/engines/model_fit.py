"""Whether models, tokenizer and limits go together, tried without weights and before anything starts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_npu.config import ModelConfig, PPOConfig
from rlhf_npu.data.problems import DataProblems
from rlhf_npu.data.prompt_files import PromptDataset
from rlhf_npu.edges import errors_as
from rlhf_npu.engines.model_folder import CONFIG, GENERATION_CONFIG, declared_stop_ids, stored_tensors
from rlhf_npu.engines.models import load_tokenizer
from rlhf_npu.errors import ModelError

POLICY = "actor_rollout_ref.model.path"
CRITIC = "critic.model.path"
MODEL = "model.path"
TENSOR_PARALLEL = "actor_rollout_ref.rollout.tensor_model_parallel_size"
NEW_HEAD = "score."  # of a reward model, which a folder of a language model has no weights of
PADDING_ADVICE = "set pad_token in its tokenizer, and pad_token_id in its config.json, to a token that no text has"
LENGTHS = "data.max_prompt_length + data.max_response_length"
# What configurations call the number of positions, and which of these decides: the smallest.
_POSITIONS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
# Scaled kinds of RoPE whose max_position_embeddings counts the scaling already.
_SCALED_ALREADY = ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")


@dataclass(frozen=True)
class Skeleton:
    """A model without weights.

    Attributes:
        module: on the meta device.
        parameters: how many numbers its weights are.
        vocabulary: token ids that it has embeddings for are below this.
    """

    module: PreTrainedModel

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.module.parameters())

    @property
    def vocabulary(self) -> int:
        return int(self.module.get_input_embeddings().weight.shape[0])


def check_fit(config: PPOConfig) -> tuple[Skeleton, PreTrainedTokenizerBase]:
    """Check that the policy, and the critic if there is one, can do what `config` asks of them.

    Returns the policy without weights, and its tokenizer.

    Raises:
        ModelError: a model cannot be built from its folder, or weights are missing, left over or of another shape;
            prompt and response are longer than its positions; the tokenizer has ids it does not know; its heads
            cannot be shared out over `tensor_model_parallel_size` devices.
    """
    with quiet():
        policy = build_skeleton(config.actor_rollout_ref.model, POLICY, AutoModelForCausalLM)
        tokenizer = load_tokenizer(config.actor_rollout_ref.model)
        _check_tensor_parallel(policy.module.config, config)
        _check_model(policy, config.actor_rollout_ref.model, POLICY, config, tokenizer)
        if config.has_critic:
            _check_critic(policy, config, tokenizer)
    return policy, tokenizer


def check_alone(model: ModelConfig, max_length: int, kind: Any) -> tuple[Skeleton, PreTrainedTokenizerBase]:
    """Check that a model can be trained on sequences of `max_length` tokens.

    Args:
        kind: transformers' class for it, which may add a head that the folder has no weights of.

    Returns it without weights, and its tokenizer.

    Raises:
        ModelError: it cannot be built from its folder, or weights are missing, left over or of another shape; it has
            fewer positions; the tokenizer has ids that it does not know, or for a classifier pads with its EOS.
    """
    with quiet():
        skeleton = build_skeleton(model, MODEL, kind, head_may_be_new=kind is AutoModelForSequenceClassification)
        tokenizer = load_tokenizer(model)
        where = f"{MODEL}={model.path}"
        check_positions(skeleton, where, max_length, f"data.max_length = {max_length} tokens", "lower it")
        check_vocabulary(tokenizer, skeleton.vocabulary, f"the model in {where}")
        if kind is AutoModelForSequenceClassification:
            check_padding_is_not_eos(tokenizer, where)
    return skeleton, tokenizer


def check_prompt_ids(data_sets: Sequence[PromptDataset], tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """Refuse prompts with token ids that the policy has no embedding for; special tokens may have such ids.

    Raises:
        DataError: names file and row of such prompts, and the token.
    """
    if not [token for token, number in tokenizer.get_vocab().items() if number >= vocabulary]:
        return
    problems = DataProblems()
    for prompts in data_sets:
        for place, outside in prompts.with_ids_from(vocabulary):
            problems.add(
                f"{prompts.location(place)}: the prompt holds the token {tokenizer.convert_ids_to_tokens(outside)!r}, "
                f"whose id {outside} the policy has no embedding for: it has {vocabulary}; use the tokenizer that the "
                "model was trained with"
            )
    problems.check()


def build_skeleton(model: ModelConfig, key: str, kind: Any, *, head_may_be_new: bool = False) -> Skeleton:
    """A model on the meta device, loaded as the engines load it but for the weights themselves.

    Args:
        head_may_be_new: of a sequence classifier, which then gets one label.

    Raises:
        ModelError: transformers cannot build it, or its weights are not those that it needs.
    """
    file = f"{key}: {Path(model.path) / CONFIG}"
    config = load_config(model, key)
    stored = stored_tensors(Path(model.path))
    layers = getattr(config.get_text_config(), "num_hidden_layers", 1)
    if not 0 < layers <= len(stored):
        raise ModelError(f"{file}: num_hidden_layers is {layers}, and the weights are {len(stored)} tensors")
    if head_may_be_new:
        config.num_labels = 1
    with errors_as(ModelError, f"{file}: transformers cannot build this model"):
        module, report = kind.from_pretrained(
            model.path,
            config=config,
            trust_remote_code=model.trust_remote_code,
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    if head_may_be_new:
        report["missing_keys"] = {name for name in report["missing_keys"] if not name.startswith(NEW_HEAD)}
    elif kind is AutoModelForSequenceClassification:
        _check_head(module, set(report["missing_keys"]), f"{key}={model.path}")
    _check_report(report, key, model.path, leftovers_matter=kind is not AutoModel and not head_may_be_new)
    return Skeleton(module)


def _check_head(classifier: PreTrainedModel, missing: set[str], where: str) -> None:
    """A head that is not in the folder would be drawn at random, with a warning at most."""
    trunk = f"{classifier.base_model_prefix}."
    drawn = sorted(name for name in missing if not name.startswith(trunk))
    if drawn:
        raise ModelError(
            f"{where}: the model has no classification head ({', '.join(drawn)}), which would be drawn at random; name "
            "a reward model: one that rlhf_npu.main_reward has trained, or another sequence classifier with one label"
        )
    labels = classifier.config.num_labels
    if labels != 1:
        raise ModelError(f"{where}: the model has {labels} labels, and a reward is one number; it must have 1")


def load_config(model: ModelConfig, key: str) -> PreTrainedConfig:
    """A model's configuration.

    Raises:
        ModelError: transformers refuses it, or it is no model that continues text.
    """
    file = f"{key}: {Path(model.path) / CONFIG}"
    with errors_as(ModelError, f"{file}: transformers refuses it"):
        config = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    if config.is_encoder_decoder:
        raise ModelError(f"{file}: model_type {config.model_type} is an encoder and a decoder; it must be a decoder")
    return config


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' warnings and progress bars: what they say is said in our words, or said by the workers."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def positions(config: PreTrainedConfig) -> tuple[float, str]:
    """How many tokens a model can be given, and what its configuration calls that; infinity if it sets no limit."""
    text = config.get_text_config()
    limits = {name: getattr(text, name, None) for name in _POSITIONS}
    numbers = {name: limit for name, limit in limits.items() if isinstance(limit, int)}
    if not numbers:
        return math.inf, ""
    name = min(numbers, key=lambda key: numbers[key])
    return numbers[name] * _rope_factor(text), name


def _rope_factor(config: PreTrainedConfig) -> float:
    if "gemma3" in config.model_type:
        return 1.0
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    factors = [kind.get("factor") for kind in kinds if kind.get("rope_type", "default") not in _SCALED_ALREADY]
    return max([1.0, *(float(factor) for factor in factors if factor)])


def _check_model(
    skeleton: Skeleton, model: ModelConfig, key: str, config: PPOConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompt, response = config.data.max_prompt_length, config.data.max_response_length
    asked = f"{LENGTHS} = {prompt} + {response} = {prompt + response} tokens"
    check_positions(skeleton, f"{key}={model.path}", prompt + response, asked, "lower one of the two")
    check_vocabulary(tokenizer, skeleton.vocabulary, f"the model in {key}={model.path}")
    for stop in declared_stop_ids(Path(model.path)) if key == POLICY else []:
        if stop >= skeleton.vocabulary:
            raise ModelError(
                f"{Path(model.path) / GENERATION_CONFIG}: eos_token_id names {stop}, but the model has only "
                f"{skeleton.vocabulary} token ids"
            )


def check_positions(skeleton: Skeleton, model: str, length: int, asked: str, advice: str) -> None:
    """Refuse sequences that are longer than a model's positions.

    Raises:
        ModelError: says what was asked for, what the model has, and the advice.
    """
    limit, name = positions(skeleton.module.config)
    if length > limit:
        raise ModelError(f"{asked}, but the model in {model} has {limit:.0f} positions ({name}); {advice}")


def _check_critic(policy: Skeleton, config: PPOConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    path, actor = config.critic.model.path, config.actor_rollout_ref.model
    model, key = (replace(actor, path=path), CRITIC) if path else (actor, POLICY)
    critic = build_skeleton(model, key, AutoModel) if path else policy
    if not isinstance(getattr(critic.module.config, "hidden_size", None), int):
        raise ModelError(f"{key}={model.path}: its {CONFIG} has no hidden_size, which the critic's value head needs")
    if not path:
        return
    _check_model(critic, model, CRITIC, config, tokenizer)
    if any((Path(path) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        _check_same_tokens(load_tokenizer(model), tokenizer, path)


def _check_same_tokens(own: PreTrainedTokenizerBase, policys: PreTrainedTokenizerBase, path: str) -> None:
    ids, read = own.get_vocab(), policys.get_vocab()
    others = [token for token, number in read.items() if ids.get(token, number) != number]
    if others:
        other = min(others, key=read.__getitem__)
        raise ModelError(
            f"{CRITIC}={path}: its tokenizer gives {other!r} the id {ids[other]}, the policy's {read[other]}; "
            "a critic reads the policy's token ids, so it must be made for the same tokenizer"
        )


def check_padding_is_not_eos(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuse what transformers would score before a text's end: it takes the last token that is not padding.

    Raises:
        ModelError: names the token.
    """
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ModelError(
            f"{where}: its padding token {tokenizer.pad_token!r} is its EOS as well, so that transformers would read a "
            f"sequence classifier's score before a text's end and not at it; {PADDING_ADVICE}"
        )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocabulary: int, model: str) -> None:
    """Refuse a tokenizer with tokens that a model has no embedding for.

    The padding id may lie outside, since masks decide, and so may special tokens that nothing adds by itself.

    Raises:
        ModelError: names one of them.
    """
    spared = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    spared |= {tokenizer.pad_token_id}
    spared -= {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id}
    outside = [
        (number, token)
        for token, number in tokenizer.get_vocab().items()
        if number >= vocabulary and number not in spared
    ]
    if outside:
        number, token = min(outside)
        raise ModelError(
            f"the tokenizer has {len(outside)} tokens that {model} has no embedding for, {token!r} with id {number} "
            f"among them: it has {vocabulary}; use the tokenizer that belongs to the model, or resize its embeddings"
        )


def _check_tensor_parallel(config: PreTrainedConfig, run: PPOConfig) -> None:
    size = run.actor_rollout_ref.rollout.tensor_model_parallel_size
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", size)
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    parts = {"num_attention_heads": heads, "intermediate_size": getattr(text, "intermediate_size", None) or size}
    for name, number in parts.items():
        if isinstance(number, int) and number % size:
            raise ModelError(f"{TENSOR_PARALLEL}={size}: must divide the model's {number} ({name})")
    if kv_heads % size and size % kv_heads:
        raise ModelError(
            f"{TENSOR_PARALLEL}={size}: must divide the model's {kv_heads} key-value heads (num_key_value_heads), or "
            "be a multiple of them"
        )


def _check_report(report: dict[str, Any], key: str, path: str, *, leftovers_matter: bool) -> None:
    """Weights that are missing would be drawn at random, and those left over dropped, without a word."""
    mismatched = sorted(str(item[0]) for item in report["mismatched_keys"])
    missing, unknown = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    for names, what in (
        (mismatched, "has weights of other shapes than its config.json says"),
        (missing, "lacks weights that its config.json asks for"),
        (unknown if leftovers_matter else [], "has weights that its config.json does not ask for"),
    ):
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ModelError(f"{key}={path}: the model {what}: {shown}")
