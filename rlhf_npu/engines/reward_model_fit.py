"""Whether a folder holds a reward model that can score a run's responses, tried without weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedTokenizerBase

from rlhf_npu.config import ModelConfig, PPOConfig
from rlhf_npu.data.conversations import Conversations
from rlhf_npu.data.sample import PromptSample
from rlhf_npu.engines.model_fit import (
    LENGTHS,
    PADDING_ADVICE,
    Skeleton,
    build_skeleton,
    check_padding_is_not_eos,
    check_positions,
    check_vocabulary,
    positions,
    quiet,
)
from rlhf_npu.engines.model_folder import CONFIG
from rlhf_npu.engines.models import read_tokenizer
from rlhf_npu.errors import ModelError

REWARD_MODEL = "reward_model.model.path"
ENDS_AT_EOS = "rlhf_npu_ends_at_eos"
"""In the configuration of reward models that `main_reward` trains: nothing stood after a response's EOS."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


class ScoringFit:
    """A reward model that can score a run's responses.

    Attributes:
        skeleton: the model without weights.
        conversations: how it reads prompts and responses.
        positions: tokens that it can be given; infinity if it sets no limit.
    """

    def __init__(self, where: str, skeleton: Skeleton, conversations: Conversations) -> None:
        self._where = where
        self.skeleton = skeleton
        self.conversations = conversations
        self.positions, _ = positions(skeleton.module.config)

    def __str__(self) -> str:
        reads = (
            "the policy's token ids" if self.conversations.as_they_are else "text, by its own tokenizer and template"
        )
        return f"reward model of {self.skeleton.parameters:,} parameters, which reads {reads}"

    def check_prompts(self, data_sets: Sequence[Sequence[PromptSample]]) -> None:
        """Refuse prompts that the reward model cannot read, where it writes them by a template of its own.

        Raises:
            ModelError: they are chats, and it has no template for them.
            DataError: the template refuses one, or there is no room for a response; names file and row.
        """
        has_chats = any(sample.messages is not None for sample in chain.from_iterable(data_sets))
        if has_chats and not self.conversations.has_template:
            raise ModelError(
                f"{self._where}: its tokenizer is another than the policy's and has no chat_template, and prompts are "
                "lists of messages; save the template that the model was trained with in its folder"
            )
        self.conversations.check_prompts(data_sets, self.positions)


def scoring_model(config: PPOConfig) -> ModelConfig:
    """The reward model's folder, with what `actor_rollout_ref.model` says of all models."""
    assert config.reward_model.model.path is not None
    return replace(config.actor_rollout_ref.model, path=config.reward_model.model.path)


def check_reward_model(config: PPOConfig, policys: PreTrainedTokenizerBase) -> ScoringFit:
    """Check that the reward model can score what the policy generates.

    Args:
        policys: the policy's tokenizer.

    Raises:
        ModelError: the folder holds no sequence classifier with one label whose head has been trained, or weights are
            missing, left over or of another shape; it has no tokenizer, or one whose padding token is missing, is its
            EOS, has no embedding or is another than the configuration's; prompt and response, where it reads the
            policy's ids, are longer than its positions.
    """
    model = scoring_model(config)
    where = f"{REWARD_MODEL}={model.path}"
    with quiet():
        skeleton = build_skeleton(model, REWARD_MODEL, AutoModelForSequenceClassification)
        tokenizer = _tokenizer(model, where)
        check_padding(tokenizer, skeleton, where)
        check_vocabulary(tokenizer, skeleton.vocabulary, f"the model in {where}")
        fit = ScoringFit(where, skeleton, conversations_of(skeleton.module.config, tokenizer, policys))
        if fit.conversations.as_they_are:
            prompt, response = config.data.max_prompt_length, config.data.max_response_length
            asked = f"{LENGTHS} = {prompt} + {response} = {prompt + response} tokens"
            check_positions(skeleton, where, prompt + response, asked, "lower one of the two")
    return fit


def conversations_of(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, policys: PreTrainedTokenizerBase
) -> Conversations:
    """How a reward model with this transformers configuration reads what the policy generates."""
    return Conversations(tokenizer, policys, up_to_eos=bool(getattr(config, ENDS_AT_EOS, False)))


def check_padding(tokenizer: PreTrainedTokenizerBase, skeleton: Skeleton, where: str) -> None:
    """Refuse a classifier of which transformers would read another token than the last of a conversation.

    It takes the last token that is not padding, by the id in the configuration.

    Raises:
        ModelError: the padding token is missing, is the EOS, has no embedding, or is another than the configuration's.
    """
    pad, declared = tokenizer.pad_token_id, skeleton.module.config.get_text_config().pad_token_id
    if pad is None:
        raise ModelError(
            f"{where}: its tokenizer has no padding token, by which the last token is found; {PADDING_ADVICE}"
        )
    check_padding_is_not_eos(tokenizer, where)
    if pad >= skeleton.vocabulary:
        raise ModelError(
            f"{where}: its padding token {tokenizer.pad_token!r} has the id {pad}, and the model has embeddings for "
            f"{skeleton.vocabulary}; {PADDING_ADVICE}"
        )
    if declared not in (None, pad):
        raise ModelError(
            f"{where}: {CONFIG} says pad_token_id={declared}, and the tokenizer pads with {tokenizer.pad_token!r}, "
            f"whose id is {pad}; {PADDING_ADVICE}"
        )


def _tokenizer(model: ModelConfig, where: str) -> PreTrainedTokenizerBase:
    """The tokenizer in the folder itself: transformers makes an empty one for some models that have none."""
    if not any((Path(model.path) / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelError(f"{where}: holds no tokenizer; save the one that the reward model was trained with there")
    return read_tokenizer(model)
