"""Chat messages of a record: checked, cleaned, and written as text by the tokenizer's chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_npu.data.values import check_depth
from rlhf_npu.edges import one_line, repr_of, within_seconds
from rlhf_npu.errors import DataError, ModelError

_RIGHT = 'it must be a string, or a list of messages such as {"role": "user", "content": "text"}'
_PROBE = "probe"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
TEMPLATE_SECONDS = 10.0
Tools = list[dict[str, Any]] | None


class ChatRenderer:
    """Writes chats as text, up to where the model answers.

    A template is a program. One that never ends would stop the run without a word, so it gets `TEMPLATE_SECONDS` for
    each chat, and the first for which that is not enough ends the run.

    Raises:
        ModelError: the template takes longer than that, or exhausts the memory, on a short message already.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # Some templates write a string and a list of text parts alike. Those of vision models may know only lists,
        # and write nothing of a string; most others know only strings.
        text, parts = (self._probed(content) for content in (_PROBE, [{"type": "text", "text": _PROBE}]))
        self._takes_strings = _PROBE in text or _PROBE not in parts
        self._takes_parts = _PROBE in parts and (text == parts or not self._takes_strings)

    def render(self, messages: Any, columnar: bool, what: str) -> str:
        """The text of `messages`, generation prompt included; after an assistant's message a new turn begins.

        Args:
            messages: a list of messages. `content` is a string, a list of text parts, or, beside `tool_calls`,
                missing. Keys that hold null count as missing: those of a message, and where `columnar` all below.
            what: file, row and key, for errors.

        Raises:
            DataError: the messages are of another form, or the template refuses them or fails.
            ModelError: the template takes more than `TEMPLATE_SECONDS`.
        """
        return self.text(self.cleaned(messages, columnar, what), what)

    def cleaned(self, messages: Any, columnar: bool, what: str) -> list[dict[str, Any]]:
        """The messages as the template takes them; for what `messages` may be and the errors see `render`."""
        check_depth(messages, what)
        cleaned = self._cleaned(messages, columnar, what)
        if not self._tokenizer.chat_template:
            raise DataError(
                f"{what} holds chat messages, but the tokenizer of {self._tokenizer.name_or_path!r} has no "
                "chat_template; use an instruction-tuned model, or make the prompt a string"
            )
        return cleaned

    def text(self, cleaned: list[dict[str, Any]], what: str, tools: Tools = None, *, asks: bool = True) -> str:
        """The text of cleaned messages.

        Args:
            tools: JSON schemas of the functions that the template offers.
            asks: whether the generation prompt follows.

        Raises:
            DataError: the template refuses them or fails.
            ModelError: it takes more than `TEMPLATE_SECONDS`.
        """
        with self._refused(what):
            return self._apply_template(cleaned, what, tools, asks)

    @property
    def marks_turns(self) -> bool:
        """Whether the template says what the assistant generates: `{% generation %}`."""
        template = self._tokenizer.chat_template
        texts = template.values() if isinstance(template, dict) else [template or ""]
        return any(_GENERATION.search(text) for text in texts)

    def marked(
        self, cleaned: list[dict[str, Any]], what: str, tools: Tools = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of a whole chat, and the places (from, to) in it that the template marks as generated.

        Raises:
            DataError, ModelError: as `text`.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self._tokenizer.get_chat_template(None, tools)
        with self._refused(what), self._in_time(what):
            (text,), (places,) = render_jinja_template(
                [cleaned],
                tools=tools,
                chat_template=template,
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
            )
        return text, places

    @contextmanager
    def _refused(self, what: str) -> Iterator[None]:
        try:
            yield
        except (KeyboardInterrupt, ModelError):
            raise
        except BaseException as error:  # a template is a program, and Rust's panics are no Exception
            refusal = f"{what}: the tokenizer's chat template refuses the messages: {one_line(error)}"
            raise DataError(refusal) from error

    def _in_time(self, what: str) -> AbstractContextManager[None]:
        endless = ModelError(f"{self._template()} takes more than {TEMPLATE_SECONDS:g} s for {what}")
        return within_seconds(TEMPLATE_SECONDS, endless)

    def _apply_template(self, messages: list[dict[str, Any]], what: str, tools: Tools = None, asks: bool = True) -> str:
        with self._in_time(what):
            return str(
                self._tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=asks)
            )

    def _template(self) -> str:
        return f"the chat template of the tokenizer in {self._tokenizer.name_or_path!r}"

    def _probed(self, content: Any) -> str:
        """A user's message as the template writes it; nothing where it wants other messages."""
        try:
            return self._apply_template([{"role": "user", "content": content}], "one short message")
        except ModelError:
            raise
        except (RecursionError, MemoryError) as error:
            raise ModelError(f"{self._template()} cannot be rendered: {one_line(error)}") from error
        except Exception:  # noqa: BLE001  # said when a message of the data is refused
            return ""

    def _cleaned(self, messages: Any, columnar: bool, what: str) -> list[dict[str, Any]]:
        if not isinstance(messages, list) or not messages:
            raise DataError(f"{what} is {_excerpt(messages)}; {_RIGHT}")
        cleaned = [self._message(message, columnar, what) for message in messages]
        if not any(_says_something(message) for message in cleaned):
            raise DataError(f"{what} is {_excerpt(messages)}: no message says anything")
        return cleaned

    def _message(self, message: Any, columnar: bool, what: str) -> dict[str, Any]:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"{what} is a list with {_excerpt(message)}; {_RIGHT}")
        drop = without_nulls if columnar else _without_null_keys
        message = drop(message)
        content = message.get("content")
        if isinstance(content, list) or (isinstance(content, str) and not self._takes_strings):
            message["content"] = self._content_of(content if isinstance(content, list) else [content], what)
        elif not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise DataError(
                f"{what} is a list with {_excerpt(message)}; its 'content' must be a string or a list of text parts, "
                "and may only be missing or null beside 'tool_calls'"
            )
        return message

    def _content_of(self, parts: list[Any], what: str) -> str | list[dict[str, str]]:
        """The parts as the template takes them: as they are, or joined by line ends as vLLM's server does."""
        texts = [_text_of(part, what) for part in parts]
        if self._takes_parts:
            return [{"type": "text", "text": text} for text in texts]
        return "\n".join(texts)


def check_is_no_chat(prompt: str, what: str) -> None:
    """Refuse a string that holds chat messages as JSON: it would be tokenized as it is.

    Raises:
        DataError: names `what`.
    """
    if not prompt.lstrip().startswith("["):
        return
    try:
        messages = json.loads(prompt)
    except (ValueError, RecursionError):
        return
    if messages and all(isinstance(message, dict) and {"role", "content"} <= message.keys() for message in messages):
        raise DataError(f"{what} is a string that holds a list of chat messages as JSON; make it that list")


def _text_of(part: Any, what: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    found = f"a part of type {kind!r}" if kind not in (None, "text") else _excerpt(part)
    raise DataError(
        f'{what} is a list with {found} in a content; only text parts, {{"type": "text", "text": "..."}}, are taken'
    )


def _says_something(message: dict[str, Any]) -> bool:
    content = message.get("content")
    texts = [part["text"] for part in content] if isinstance(content, list) else [content or ""]
    return bool(message.get("tool_calls")) or any(text.strip() for text in texts)


def _without_null_keys(message: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if value is not None}


def without_nulls(value: Any) -> Any:
    """`value` without the keys that hold null, at any depth."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def _excerpt(value: Any) -> str:
    text = repr_of(value)
    return text if len(text) <= 80 else text[:80] + "..."
