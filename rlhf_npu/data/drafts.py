"""Records of pairs, of single completions and of conversations, as text in which is marked what is trained.

The forms are those of TRL's data sets: `prompt`, `chosen`, `rejected`; `prompt`, `completion`, `label`; `messages`;
`text`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from rlhf_npu.data.chats import ChatRenderer, Tools, check_is_no_chat, without_nulls
from rlhf_npu.data.records import Record
from rlhf_npu.data.turns import ASSISTANT, Chat, Message, Piece, TurnFinder
from rlhf_npu.data.values import check_depth, check_text
from rlhf_npu.edges import repr_of
from rlhf_npu.errors import DataError

Kind = Literal["sft", "pairs", "unpaired"]
COMPLETIONS: dict[Kind, int] = {"sft": 1, "pairs": 2, "unpaired": 1}
"""Completions of an example of each kind."""


@dataclass(frozen=True)
class Draft:
    """A record as text.

    Attributes:
        location: `file:row`.
        prompt: None where completions are whole texts: what two have in common is then their prompt, and of a single
            one its first token.
        completions: one, or chosen and rejected.
        is_chat: written by the chat template, special tokens included.
        label: unpaired: whether the completion is desirable.
        margin: pairs: by how much the chosen one is better.
    """

    location: str
    prompt: str | None
    completions: tuple[tuple[Piece, ...], ...]
    is_chat: bool
    label: bool = False
    margin: float = 0.0


class Drafter:
    """Checks records of one kind and makes drafts of them."""

    def __init__(self, kind: Kind, chats: ChatRenderer, turns: TurnFinder) -> None:
        readers: dict[Kind, Callable[[_Fields], Draft]] = {
            "sft": self._conversation,
            "pairs": self._pair,
            "unpaired": self._unpaired,
        }
        self._read = readers[kind]
        self._chats = chats
        self._turns = turns

    def draft(self, record: Record) -> Draft:
        """What the record says.

        Raises:
            DataError: it has another form, or the chat template refuses it; names file and row.
            ModelError: the chat template takes too long.
        """
        if not isinstance(record.value, dict):
            raise DataError(f"{record.location}: a {type(record.value).__name__}; a record is an object")
        return self._read(_Fields(record.value, record.columnar, record.location))

    def _pair(self, fields: _Fields) -> Draft:
        chosen, rejected = fields.of("chosen"), fields.of("rejected")
        if chosen == rejected:
            raise DataError(f"{fields.location}: 'chosen' and 'rejected' are the same; a pair needs two answers")
        margin = fields.margin()
        if isinstance(chosen, str) != isinstance(rejected, str):
            raise DataError(f"{fields.location}: 'chosen' and 'rejected' must both be text, or both lists of messages")
        prompt = fields.value.get("prompt")
        if isinstance(chosen, str) and prompt is None:
            texts = (fields.text("chosen"), fields.text("rejected"))
            return Draft(fields.location, None, tuple((Piece(text, True),) for text in texts), False, margin=margin)
        if isinstance(chosen, str) or isinstance(prompt, list):
            return self._answered(fields, "chosen", "rejected", margin=margin)
        return self._whole_chats(fields, margin)

    def _unpaired(self, fields: _Fields) -> Draft:
        label = fields.of("label")
        if not isinstance(label, bool):
            raise DataError(f"{fields.location}: 'label' is {repr_of(label)[:80]}; it must be true or false")
        fields.of("prompt")
        return self._answered(fields, "completion", label=label)

    def _conversation(self, fields: _Fields) -> Draft:
        forms = {"messages": ("messages",), "prompt and completion": ("prompt", "completion"), "text": ("text",)}
        found = [name for name, keys in forms.items() if all(fields.value.get(key) is not None for key in keys)]
        if len(found) != 1:
            raise DataError(
                f"{fields.location}: has {' as well as '.join(found) or fields.names()}; it needs one of 'messages', "
                "'prompt' with 'completion', and 'text'"
            )
        if found == ["text"]:
            return Draft(fields.location, None, ((Piece(fields.text("text"), True),),), is_chat=False)
        if found == ["messages"]:
            return self._messages(fields)
        return self._answered(fields, "completion")

    def _messages(self, fields: _Fields) -> Draft:
        what, messages = fields.what("messages"), fields.of("messages")
        cleaned = self._cleaned(messages, fields, "messages")
        chat = Chat(cleaned, self._turns.first(cleaned), fields.tools(), what)
        prompt, pieces = self._turns.pieces(chat)
        return Draft(fields.location, prompt, (pieces,), is_chat=True)

    def _answered(self, fields: _Fields, *keys: str, label: bool = False, margin: float = 0.0) -> Draft:
        """A record with a prompt, and completions under `keys`."""
        if isinstance(fields.of("prompt"), str):
            texts = tuple((Piece(fields.text(key), True),) for key in keys)
            prompt = fields.text("prompt", may_be_empty=True)
            return Draft(fields.location, prompt, texts, False, label, margin)
        asked = self._cleaned(fields.of("prompt"), fields, "prompt")
        chats = [self._continued(asked, fields, key) for key in keys]
        return self._of_chats(fields, chats, label, margin)

    def _continued(self, asked: list[Message], fields: _Fields, key: str) -> Chat:
        completion = fields.of(key)
        if isinstance(completion, str):
            completion = [{"role": ASSISTANT, "content": fields.text(key)}]
        answer = self._cleaned(completion, fields, key)
        if len(answer) > len(asked) and answer[: len(asked)] == asked:
            answer = answer[len(asked) :]
        return _chat(asked, answer, fields, key)

    def _whole_chats(self, fields: _Fields, margin: float) -> Draft:
        """Chosen and rejected are chats that begin alike; a prompt that is text repeats the last question."""
        chats = [self._cleaned(fields.of(key), fields, key) for key in ("chosen", "rejected")]
        shared = 0
        while shared < min(map(len, chats)) - 1 and chats[0][shared] == chats[1][shared]:
            shared += 1
        if not shared:
            raise DataError(
                f"{fields.location}: 'chosen' and 'rejected' have no first message in common, and there is no 'prompt' "
                "of messages; a pair answers one prompt"
            )
        prompt, last = fields.value.get("prompt"), chats[0][shared - 1].get("content")
        if prompt is not None and _words(last) != prompt:
            raise DataError(
                f"{fields.location}: 'prompt' is {repr_of(prompt)[:80]}, but 'chosen' and 'rejected' are chats that "
                f"both answer {repr_of(last)[:80]}; make the prompt a list of messages, or leave it out"
            )
        pair = zip(chats, ("chosen", "rejected"), strict=True)
        return self._of_chats(
            fields, [_chat(chat[:shared], chat[shared:], fields, key) for chat, key in pair], margin=margin
        )

    def _of_chats(self, fields: _Fields, chats: list[Chat], label: bool = False, margin: float = 0.0) -> Draft:
        cut = [self._turns.pieces(chat) for chat in chats]
        if len({prompt for prompt, _ in cut}) > 1:
            raise DataError(f"{fields.location}: the chat template writes the prompt otherwise for chosen and rejected")
        return Draft(fields.location, cut[0][0], tuple(pieces for _, pieces in cut), True, label, margin)

    def _cleaned(self, messages: Any, fields: _Fields, key: str) -> list[Message]:
        what = fields.what(key)
        cleaned = self._chats.cleaned(messages, fields.columnar, what)
        for message in cleaned:
            content = message.get("content") or ""
            for text in [content] if isinstance(content, str) else [part["text"] for part in content]:
                check_text(text, what)
        return cleaned


@dataclass(frozen=True)
class _Fields:
    """A record's fields, and the words for what is wrong with them."""

    value: dict[str, Any]
    columnar: bool
    location: str

    def what(self, key: str) -> str:
        return f"{self.location}: {key!r}"

    def names(self) -> str:
        return ", ".join(map(repr, self.value)) or "no keys"

    def of(self, key: str) -> Any:
        if self.value.get(key) is None:
            raise DataError(f"{self.location}: no {key!r}; the record has {self.names()}")
        return self.value[key]

    def text(self, key: str, may_be_empty: bool = False) -> str:
        text, what = self.of(key), self.what(key)
        if not isinstance(text, str):
            raise DataError(f"{what} is {repr_of(text)[:80]}; it must be a string where the prompt is one")
        check_text(text, what)
        check_is_no_chat(text, what)
        if not may_be_empty and not text.strip():
            raise DataError(f"{what} is {text[:80]!r}, which says nothing; there must be something to learn")
        return text

    def margin(self) -> float:
        margin = self.value.get("margin")
        if margin is None:
            return 0.0
        if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
            raise DataError(f"{self.what('margin')} is {repr_of(margin)[:80]}; it must be a finite number")
        return float(margin)

    def tools(self) -> Tools:
        """Functions the chat template may offer: a list of JSON schemas, or that list as JSON text."""
        tools = self.value.get("tools")
        if isinstance(tools, str):
            try:
                tools = json.loads(tools)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{self.what('tools')} is text that is no JSON ({error})") from error
        if tools is None or tools == []:
            return None
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise DataError(f"{self.what('tools')} is {repr_of(tools)[:80]}; it must be a list of JSON schemas")
        check_depth(tools, self.what("tools"))
        return [without_nulls(tool) if self.columnar else tool for tool in tools]


def _chat(asked: list[Message], answer: list[Message], fields: _Fields, key: str) -> Chat:
    if answer[0]["role"] != ASSISTANT:
        raise DataError(
            f"{fields.what(key)} continues the prompt with a message of the role {answer[0]['role']!r}; "
            "it must be the assistant's"
        )
    return Chat(asked + answer, len(asked), fields.tools(), fields.what(key))


def _words(content: Any) -> Any:
    """A content as text, where it is one part."""
    if isinstance(content, list) and len(content) == 1:
        return content[0]["text"]
    return content
