"""Prompts with their responses as the token ids that a reward model reads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_npu.data.chats import ChatRenderer
from rlhf_npu.data.drafts import Draft
from rlhf_npu.data.encoding import Encoded, Encoder, Ids, Limits, TokenizerCalls
from rlhf_npu.data.problems import DataProblems
from rlhf_npu.data.sample import PromptSample
from rlhf_npu.data.turns import ASSISTANT, Piece
from rlhf_npu.errors import DataError

PROBE = "1"
CHECKED_AT_ONCE = 1024
_ANY_LENGTH = Limits(max_length=1 << 62, filter_overlong=False, truncation="error")


@dataclass(frozen=True)
class Answer:
    """A response to a prompt, in the policy's token ids; `finished` says that it ended by itself."""

    sample: PromptSample
    token_ids: tuple[int, ...]
    finished: bool


@dataclass(frozen=True)
class _Written:
    sample: PromptSample
    response: str
    finished: bool


class Conversations:
    """Writes prompts and responses as a reward model's token ids.

    Where its tokenizer and chat template are the policy's, these are the prompt's ids and the response's. Otherwise the
    messages and the response, without the policy's special tokens, go through its own template, which ends a response
    whether or not it ended by itself; a prompt that is text and its response become the tokens that `main_reward`
    trains on, with the EOS of the reward model's tokenizer after a response that ended by itself.

    Args:
        tokenizer: the reward model's.
        policys: the policy's.
        up_to_eos: leave out the white space that a template writes after the last EOS, as `main_reward` does.

    Attributes:
        as_they_are: whether ids are passed as they are.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, policys: PreTrainedTokenizerBase, *, up_to_eos: bool = False
    ) -> None:
        self.as_they_are = writes_alike(tokenizer, policys)
        self._policys = policys
        self._eos = str(tokenizer.eos_token) if up_to_eos and tokenizer.eos_token else None
        self._calls = TokenizerCalls(tokenizer)
        self._encoder = Encoder(tokenizer, _ANY_LENGTH)
        self._chats = ChatRenderer(tokenizer)
        self.has_template = bool(tokenizer.chat_template)

    def ids(self, answers: Sequence[Answer]) -> list[Ids | str]:
        """Token ids of each conversation, or why there are none."""
        if self.as_they_are:
            return [[*answer.sample.prompt_ids, *answer.token_ids] for answer in answers]
        decode = self._policys.decode
        return self._written(
            [_Written(each.sample, decode(each.token_ids, skip_special_tokens=True), each.finished) for each in answers]
        )

    def check_prompts(self, data_sets: Iterable[Sequence[PromptSample]], positions: float) -> None:
        """Refuse prompts that the reward model's template refuses, or that leave it no room for a response.

        Args:
            positions: tokens that it can be given.

        Raises:
            DataError: names file and row of each.
        """
        problems = DataProblems()
        samples = iter(chain.from_iterable(data_sets))
        while part := list(islice(samples, CHECKED_AT_ONCE)):
            rows = self._written([_Written(sample, PROBE, finished=True) for sample in part])
            for sample, ids in zip(part, rows, strict=True):
                if isinstance(ids, str):
                    problems.add(f"{sample.location}: {ids}")
                elif len(ids) > positions:
                    problems.add(
                        f"{sample.location}: with a response of one character the prompt takes {len(ids)} tokens of "
                        f"the reward model's tokenizer, and the model has {positions:.0f} positions; take it away"
                    )
        problems.check()

    def _written(self, conversations: Sequence[_Written]) -> list[Ids | str]:
        rows: list[Ids | str] = [""] * len(conversations)
        for is_chat, encode in ((True, self._chat_ids), (False, self._text_ids)):
            places = [at for at, each in enumerate(conversations) if (each.sample.messages is not None) == is_chat]
            for at, ids in zip(places, encode([conversations[at] for at in places]), strict=True):
                rows[at] = ids
        return rows

    def _text_ids(self, conversations: list[_Written]) -> Iterator[Ids | str]:
        drafts = [
            Draft("the conversation", each.sample.prompt_text, ((Piece(each.response, trained=True),),), is_chat=False)
            for each in conversations
        ]
        for each, encoded in zip(conversations, self._encoder.encode(drafts), strict=True):
            if not isinstance(encoded, Encoded):
                yield str(encoded)
                continue
            assert encoded.example is not None
            (completion,) = encoded.example.completions
            ids = [*encoded.example.prompt.tolist(), *completion.input_ids.tolist()]
            yield ids if each.finished else ids[:-1]  # without the EOS that the encoder ends a text with

    def _chat_ids(self, conversations: list[_Written]) -> Iterator[Ids | str]:
        texts = [self._text(each) for each in conversations]
        known = self._calls.many([text for text in texts if isinstance(text, str)], special=False)
        for text in texts:
            yield str(text) if isinstance(text, DataError) else known[text]

    def _text(self, conversation: _Written) -> str | DataError:
        assert conversation.sample.messages is not None
        messages = [*conversation.sample.messages, {"role": ASSISTANT, "content": conversation.response}]
        try:
            text = self._chats.text(
                self._chats.cleaned(messages, columnar=False, what="the conversation"), "the conversation", asks=False
            )
        except DataError as error:
            return error
        ended = text.rstrip()
        return ended if self._eos and ended.endswith(self._eos) else text


def writes_alike(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether both write every text, and every chat, as the same ids; what they pad with does not matter."""
    if not (tokenizer.is_fast and other.is_fast):
        return False  # their rules cannot be compared
    return _rules(tokenizer) == _rules(other)


def _rules(tokenizer: Any) -> tuple[Any, ...]:
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    for setting_of_a_call in ("padding", "truncation"):
        rules.pop(setting_of_a_call, None)
    named = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if name != "pad_token"}
    return rules, named, tokenizer.chat_template
