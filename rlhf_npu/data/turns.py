"""Where in the text of a chat the assistant speaks: what is trained on, to the character."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rlhf_npu.data.chats import ChatRenderer, Tools
from rlhf_npu.errors import DataError

ASSISTANT = "assistant"
Message = dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """A stretch of a completion's text, which is trained or not."""

    text: str
    trained: bool


@dataclass(frozen=True)
class Chat:
    """A chat whose first `asked` messages are the prompt.

    Attributes:
        messages: cleaned, see `ChatRenderer.cleaned`.
        what: file, row and key, for errors.
    """

    messages: list[Message]
    asked: int
    tools: Tools
    what: str


class TurnFinder:
    """Cuts the text of chats into a prompt and pieces.

    A template with `{% generation %}` says itself what the assistant generates. Of others a turn is what stands between
    the text of all messages before it, generation prompt included, and the text of all messages up to it; a template
    for which these are not the beginning of the whole is refused. White space that it writes after the tokenizer's EOS
    is not trained, for no model generates it.

    Args:
        train_on: all_assistant or last_assistant, of the turns after the prompt.
    """

    def __init__(self, chats: ChatRenderer, eos: str | None, train_on: str) -> None:
        self._chats = chats
        self._marks_turns = chats.marks_turns
        self._eos = eos
        self._train_on = train_on

    def first(self, messages: list[Message]) -> int:
        """Index of the first message that is trained on in a chat without a prompt of its own; their number if none."""
        turns = [index for index, message in enumerate(messages) if _is_assistants(message)]
        if not turns:
            return len(messages)
        return turns[0] if self._train_on == "all_assistant" else turns[-1]

    def pieces(self, chat: Chat) -> tuple[str, tuple[Piece, ...]]:
        """The text of the prompt, and the pieces that follow up to the last that is trained.

        Raises:
            DataError: the assistant says nothing after the prompt, or the template writes the beginning of the chat
                otherwise than the whole.
            ModelError: the template takes too long.
        """
        turns = [index for index in range(chat.asked, len(chat.messages)) if _is_assistants(chat.messages[index])]
        if not turns:
            raise DataError(f"{chat.what}: no message of the role 'assistant' to train on")
        if not chat.asked:
            raise DataError(f"{chat.what}: begins with the assistant's message; put first what it answers")
        if self._train_on == "last_assistant":
            turns = turns[-1:]
        if self._marks_turns:
            whole, asked, places = self._marked(chat, turns[0])
        else:
            whole = self._chats.text(chat.messages, chat.what, chat.tools, asks=False)
            asked = self._beginning(chat, whole, chat.asked, asks=True)
            places = [self._place(chat, whole, turn, asked) for turn in turns]
        return asked, tuple(_cut(whole, len(asked), places))

    def _marked(self, chat: Chat, first: int) -> tuple[str, str, list[tuple[int, int]]]:
        """The whole, the prompt, and what the template marks of the turn `first` and of those after it."""
        whole, marked = self._chats.marked(chat.messages, chat.what, chat.tools)
        start = len(self._beginning(chat, whole, first, asks=False))
        if any(begin < start < end for begin, end in marked):
            raise DataError(f"{chat.what}: the chat template marks the prompt as generated; it cannot be trained on")
        places = [(begin, end) for begin, end in marked if start <= begin < end]
        if not places:
            raise DataError(f"{chat.what}: the chat template marks nothing of the assistant's as generated")
        asked = self._chats.text(chat.messages[: chat.asked], chat.what, chat.tools)
        if not whole[: places[0][0]].startswith(asked):
            asked = self._beginning(chat, whole, chat.asked, asks=False)
        return whole, asked, places

    def _place(self, chat: Chat, whole: str, turn: int, asked: str) -> tuple[int, int]:
        """Where a turn is in the text of a template that marks none."""
        before = asked if turn == chat.asked else self._beginning(chat, whole, turn, asks=True)
        text = self._beginning(chat, whole, turn + 1, asks=False)[len(before) :]
        if self._eos and text.rstrip().endswith(self._eos):
            text = text.rstrip()
        if not text:
            raise DataError(f"{chat.what}: the chat template writes nothing of message {turn + 1}")
        return len(before), len(before) + len(text)

    def _beginning(self, chat: Chat, whole: str, count: int, *, asks: bool) -> str:
        """The text of the first `count` messages, which must be the beginning of the whole."""
        if count == len(chat.messages):
            return whole
        text = self._chats.text(chat.messages[:count], chat.what, chat.tools, asks=asks)
        if whole.startswith(text):
            return text
        at = next(index for index, (a, b) in enumerate(zip(text, [*whole, ""], strict=False)) if a != b)
        raise DataError(
            f"{chat.what}: the chat template writes the first {count} of {len(chat.messages)} messages"
            f"{' and the generation prompt' if asks else ''} otherwise when the rest follows ({text[at : at + 40]!r} "
            f"becomes {whole[at : at + 40]!r}), so that what the assistant generates cannot be told; use a template "
            "with {% generation %}, or, where it rewrites earlier turns, data.train_on=last_assistant"
        )


def _is_assistants(message: Message) -> bool:
    return bool(message["role"] == ASSISTANT)


def _cut(whole: str, start: int, places: list[tuple[int, int]]) -> list[Piece]:
    pieces = []
    for begin, end in places:
        if begin > start:
            pieces.append(Piece(whole[start:begin], trained=False))
        pieces.append(Piece(whole[begin:end], trained=True))
        start = end
    return pieces
