"""Prompts from Parquet or JSON-lines files, as token ids that fit the model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, overload

import jinja2
import pyarrow
import pyarrow.parquet
from transformers import PreTrainedTokenizerBase

from rlhf_npu.config import DataConfig
from rlhf_npu.errors import DataError


@dataclass(frozen=True)
class PromptSample:
    """One prompt and what a reward function needs to score a response to it.

    Attributes:
        index: place in the data set it was loaded into.
        prompt_ids: token ids the model continues.
        prompt_text: the same as text, special tokens of a chat template included.
        data_source: name of the task.
        ground_truth: the right answer, as the reward function wants it.
        extra_info: whatever else the record carries.
    """

    index: int
    prompt_ids: tuple[int, ...]
    prompt_text: str
    data_source: str
    ground_truth: Any
    extra_info: dict[str, Any]


class PromptDataset(Sequence[PromptSample]):
    """Prompts in the order of their files.

    Attributes:
        skipped: prompts left out because they are too long.
        truncated: prompts that were cut because they are too long.
    """

    def __init__(self, samples: Iterable[PromptSample], skipped: int = 0, truncated: int = 0) -> None:
        self._samples = tuple(samples)
        self.skipped = skipped
        self.truncated = truncated

    def __len__(self) -> int:
        return len(self._samples)

    @overload
    def __getitem__(self, index: int) -> PromptSample: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[PromptSample, ...]: ...

    def __getitem__(self, index: int | slice) -> PromptSample | tuple[PromptSample, ...]:
        return self._samples[index]


@dataclass(frozen=True)
class _Prompt:
    """A checked record: where it stands (file and line), and its text."""

    location: str
    text: str
    is_chat: bool
    data_source: str
    ground_truth: Any
    extra_info: dict[str, Any]


def load_prompts(files: Sequence[str], tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> PromptDataset:
    """Load, check and tokenize prompts.

    A record has the prompt under `config.prompt_key`, `data_source`, `reward_model.ground_truth` and, if
    wanted, `extra_info`. A prompt that is a list of chat messages goes through the tokenizer's chat
    template; one that is a string is tokenized as it is, with the special tokens that the tokenizer adds by
    itself.

    Raises:
        DataError: a file is missing, of another kind or malformed; a record lacks a key; a prompt is empty, or
            is too long and neither skipped nor truncated; nothing is left. Names the file and the line or row,
            from 1.
    """
    prompts = [_check(*record, tokenizer, config.prompt_key) for file in files for record in _records(Path(file))]
    if not prompts:
        raise DataError(f"{', '.join(files)}: no prompts; a file needs at least one record")
    limit = config.max_prompt_length
    rows = list(zip(prompts, _tokenize(prompts, tokenizer), strict=True))
    kept = [row for row in rows if len(row[1]) <= limit or not config.filter_overlong_prompts]
    if not kept:
        raise DataError(
            f"{', '.join(files)}: all {len(rows)} prompts are longer than "
            f"data.max_prompt_length={limit} tokens; raise it"
        )
    samples = [_sample(index, *row, tokenizer, config) for index, row in enumerate(kept)]
    truncated = sum(len(ids) > limit for _, ids in kept)
    return PromptDataset(samples, skipped=len(rows) - len(kept), truncated=truncated)


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """(file and line, record) of each record."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; data.train_files and data.val_files name files of prompts")
    if path.suffix == ".parquet":
        return _parquet_records(path)
    if path.suffix in (".jsonl", ".json"):
        return _json_records(path)
    raise DataError(f"{path}: cannot read {path.suffix or 'a file without a suffix'}; use .parquet, .jsonl or .json")


def _parquet_records(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error
    for number, record in enumerate(table.to_pylist(), start=1):
        yield f"{path}:{number}", record


def _json_records(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}:{number}", _parse_json(line, f"{path}:{number}")


def _parse_json(line: bytes, location: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise DataError(f"{location}: not JSON ({error}); a line holds one whole JSON object") from error


def _check(location: str, record: Any, tokenizer: PreTrainedTokenizerBase, prompt_key: str) -> _Prompt:
    if not isinstance(record, dict):
        raise DataError(f"{location}: a {type(record).__name__}; a record is an object with a {prompt_key!r}")
    prompt = _field(record, prompt_key, location)
    data_source = _field(record, "data_source", location)
    reward_model = _field(record, "reward_model", location)
    if not isinstance(reward_model, dict) or "ground_truth" not in reward_model:
        raise DataError(f"{location}: no 'reward_model.ground_truth'; it holds the right answer, or null")
    extra_info = record.get("extra_info") or {}
    if not isinstance(extra_info, dict):
        raise DataError(f"{location}: 'extra_info' is {extra_info!r}; it must be an object")
    is_chat = not isinstance(prompt, str)
    text = _render_chat(prompt, tokenizer, f"{location}: {prompt_key!r}") if is_chat else prompt
    return _Prompt(location, text, is_chat, str(data_source), reward_model["ground_truth"], extra_info)


def _field(record: dict[str, Any], key: str, location: str) -> Any:
    if record.get(key) is None:
        raise DataError(f"{location}: no {key!r}; the record has {', '.join(map(repr, record)) or 'no keys'}")
    return record[key]


def _render_chat(messages: Any, tokenizer: PreTrainedTokenizerBase, location: str) -> str:
    if not _are_messages(messages):
        raise DataError(
            f"{location} is {str(messages)[:80]!r}; it must be a string, or a list of messages "
            'such as {"role": "user", "content": "text"}'
        )
    if not tokenizer.chat_template:
        raise DataError(
            f"{location} holds chat messages, but the tokenizer of {tokenizer.name_or_path!r} has no "
            "chat_template; use an instruction-tuned model, or make the prompt a string"
        )
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except jinja2.TemplateError as error:
        raise DataError(f"{location}: the tokenizer's chat template refuses the messages: {error}") from error
    return str(text)


def _are_messages(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and bool(messages)
        and all(
            isinstance(message, dict) and isinstance(message.get(key), str)
            for message in messages
            for key in ("role", "content")
        )
    )


def _tokenize(prompts: list[_Prompt], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of each prompt. A chat template writes its special tokens itself."""
    rows: list[list[int]] = []
    for is_chat, run in groupby(prompts, key=lambda prompt: prompt.is_chat):
        rows += tokenizer([prompt.text for prompt in run], add_special_tokens=not is_chat, verbose=False)["input_ids"]
    for prompt, ids in zip(prompts, rows, strict=True):
        if not ids:
            raise DataError(f"{prompt.location}: the prompt {prompt.text!r} has no tokens; it needs at least one")
    return rows


def _sample(
    index: int, prompt: _Prompt, ids: list[int], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> PromptSample:
    text = prompt.text
    if len(ids) > config.max_prompt_length:
        ids = _truncate(ids, prompt, config)
        text = tokenizer.decode(ids)
    return PromptSample(index, tuple(ids), text, prompt.data_source, prompt.ground_truth, prompt.extra_info)


def _truncate(ids: list[int], prompt: _Prompt, config: DataConfig) -> list[int]:
    limit = config.max_prompt_length
    if config.truncation == "left":
        return ids[-limit:]
    if config.truncation == "right":
        return ids[:limit]
    raise DataError(
        f"{prompt.location}: {len(ids)} tokens, more than data.max_prompt_length={limit}; raise it, "
        "set data.filter_overlong_prompts=true to skip such prompts, or data.truncation=left|right to cut"
    )
