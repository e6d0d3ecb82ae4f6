"""Prompts from Parquet or JSON files, as token ids that fit the model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, overload

from transformers import PreTrainedTokenizerBase

from rlhf_npu.config import DataConfig
from rlhf_npu.data.chats import ChatRenderer, check_is_no_chat, without_nulls
from rlhf_npu.data.problems import DataProblems
from rlhf_npu.data.records import Record, read_records
from rlhf_npu.data.sample import PromptSample
from rlhf_npu.data.values import check_depth, check_text
from rlhf_npu.edges import one_line, repr_of
from rlhf_npu.errors import DataError

__all__ = ["PromptDataset", "PromptSample", "collect_prompts", "load_prompts"]


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
    """A checked record: where it stands, and its text."""

    file: str
    row: int
    text: str
    is_chat: bool
    data_source: str
    ground_truth: Any
    extra_info: dict[str, Any]
    messages: list[dict[str, Any]] | None

    @property
    def location(self) -> str:
        return f"{self.file}:{self.row}"


def load_prompts(files: Sequence[str], tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> PromptDataset:
    """Load, check and tokenize prompts.

    A record has the prompt under `config.prompt_key`, `data_source`, `reward_model.ground_truth` and, if
    wanted, `extra_info`. A prompt that is a list of chat messages goes through the tokenizer's chat
    template; one that is a string is tokenized as it is, with the special tokens that the tokenizer adds by
    itself.

    Raises:
        DataError: a file is missing, of another kind, malformed or empty; a record lacks a key or holds what cannot
            be used; the template or the tokenizer fails on it; a prompt is empty, or is too long and neither skipped
            nor truncated; nothing is left. Names file and row, from 1, of all that is wrong; see `DataProblems`.
    """
    problems = DataProblems()
    dataset = collect_prompts(files, tokenizer, config, problems)
    problems.check()
    return dataset


def collect_prompts(
    files: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    problems: DataProblems,
    *,
    keeps_messages: bool = False,
) -> PromptDataset:
    """`load_prompts` for one of several data sets: what is wrong is added to `problems`, for the caller to check.

    Args:
        keeps_messages: whether samples carry the messages of prompts that are chats.
    """
    prompts = list(_checked_records(files, tokenizer, config.prompt_key, problems, keeps_messages))
    rows = list(_tokenize(prompts, tokenizer, problems))
    if not config.filter_overlong_prompts and config.truncation == "error":
        _refuse_overlong(rows, config.max_prompt_length, problems)
    limit = config.max_prompt_length
    kept = [row for row in rows if len(row[1]) <= limit or not config.filter_overlong_prompts]
    if rows and not kept:
        problems.add(
            f"{', '.join(files)}: all {len(rows)} prompts are longer than "
            f"data.max_prompt_length={limit} tokens; raise it"
        )
    samples = [_sample(index, *row, tokenizer, config) for index, row in enumerate(kept)]
    truncated = sum(len(ids) > limit for _, ids in kept)
    return PromptDataset(samples, skipped=len(rows) - len(kept), truncated=truncated)


def _checked_records(
    files: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    prompt_key: str,
    problems: DataProblems,
    keeps_messages: bool,
) -> Iterator[_Prompt]:
    chats = ChatRenderer(tokenizer)
    for file in files:
        before, records = len(problems), 0
        for record in read_records(file, problems):
            records += 1
            try:
                prompt = _check(record, chats, prompt_key, keeps_messages)
            except DataError as error:
                problems.add(str(error))
            else:
                yield prompt
        if not records and len(problems) == before:
            problems.add(f"{file}: no prompts; a file needs at least one record")


def _check(record: Record, chats: ChatRenderer, prompt_key: str, keeps_messages: bool) -> _Prompt:
    location, value = record.location, record.value
    if not isinstance(value, dict):
        raise DataError(f"{location}: a {type(value).__name__}; a record is an object with a {prompt_key!r}")
    prompt = _field(value, prompt_key, location)
    data_source = _data_source(_field(value, "data_source", location), location)
    ground_truth = _ground_truth(_field(value, "reward_model", location), location)
    extra_info = value.get("extra_info") or {}
    if not isinstance(extra_info, dict):
        raise DataError(f"{location}: 'extra_info' is {repr_of(extra_info)[:80]}; it must be an object")
    check_depth(extra_info, f"{location}: 'extra_info'")
    is_chat = not isinstance(prompt, str)
    what = f"{location}: {prompt_key!r}"
    text = chats.render(prompt, record.columnar, what) if is_chat else _plain(prompt, location, what)
    check_text(text, what)
    messages = (without_nulls(prompt) if record.columnar else prompt) if is_chat and keeps_messages else None
    return _Prompt(record.file, record.row, text, is_chat, data_source, ground_truth, extra_info, messages)


def _field(record: dict[str, Any], key: str, location: str) -> Any:
    if record.get(key) is None:
        raise DataError(f"{location}: no {key!r}; the record has {', '.join(map(repr, record)) or 'no keys'}")
    return record[key]


def _data_source(name: Any, location: str) -> str:
    """The name of the task, which becomes part of a metric's name."""
    text = str(name) if isinstance(name, int) and not isinstance(name, bool) else name
    if not isinstance(text, str) or not text.strip() or not text.isprintable():
        raise DataError(
            f"{location}: 'data_source' is {repr_of(name)[:80]}; it must be a name of printable characters, "
            "such as gsm8k"
        )
    return text


def _ground_truth(reward_model: Any, location: str) -> Any:
    if not isinstance(reward_model, dict) or "ground_truth" not in reward_model:
        raise DataError(f"{location}: no 'reward_model.ground_truth'; it holds the right answer, or null")
    ground_truth, what = reward_model["ground_truth"], f"{location}: 'reward_model.ground_truth'"
    if isinstance(ground_truth, float) and not math.isfinite(ground_truth):
        raise DataError(f"{what} is {ground_truth}; no answer equals it")
    if isinstance(ground_truth, str):
        check_text(ground_truth, what)
    check_depth(ground_truth, what)
    return ground_truth


def _plain(prompt: str, location: str, what: str) -> str:
    check_is_no_chat(prompt, what)
    if not prompt.strip():
        raise DataError(f"{location}: the prompt {prompt[:80]!r} has no tokens other than white space; ask something")
    return prompt


def _tokenize(
    prompts: list[_Prompt], tokenizer: PreTrainedTokenizerBase, problems: DataProblems
) -> Iterator[tuple[_Prompt, list[int]]]:
    """Each prompt with its token ids. A chat template writes its special tokens itself."""
    for is_chat, run in groupby(prompts, key=lambda prompt: prompt.is_chat):
        group = list(run)
        for prompt, ids in zip(group, _token_ids(group, is_chat, tokenizer, problems), strict=True):
            if ids:
                yield prompt, ids
            elif ids is not None:
                problems.add(f"{prompt.location}: the prompt {prompt.text[:80]!r} has no tokens; it needs at least one")


def _token_ids(
    prompts: list[_Prompt], is_chat: bool, tokenizer: PreTrainedTokenizerBase, problems: DataProblems
) -> list[list[int] | None]:
    """Token ids of each prompt; None for those on which the tokenizer fails, which are problems."""
    try:
        rows: list[list[int] | None] = _encode(prompts, is_chat, tokenizer)
        return rows
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001  # Rust's panics are no Exception; below the prompt is found
        if len(prompts) == 1:
            problems.add(f"{prompts[0].location}: the tokenizer fails on {prompts[0].text[:80]!r}: {one_line(error)}")
            return [None]
    middle = len(prompts) // 2
    halves = prompts[:middle], prompts[middle:]
    return [ids for half in halves for ids in _token_ids(half, is_chat, tokenizer, problems)]


def _encode(prompts: list[_Prompt], is_chat: bool, tokenizer: PreTrainedTokenizerBase) -> Any:
    texts = [prompt.text for prompt in prompts]
    return tokenizer(texts, add_special_tokens=not is_chat, verbose=False)["input_ids"]


def _refuse_overlong(rows: list[tuple[_Prompt, list[int]]], limit: int, problems: DataProblems) -> None:
    for prompt, ids in rows:
        if len(ids) > limit:
            problems.add(
                f"{prompt.location}: {len(ids)} tokens, more than data.max_prompt_length={limit}; raise it, "
                "set data.filter_overlong_prompts=true to skip such prompts, or data.truncation=left|right to cut"
            )


def _sample(
    index: int, prompt: _Prompt, ids: list[int], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> PromptSample:
    text, limit = prompt.text, config.max_prompt_length
    if len(ids) > limit:
        ids = ids[-limit:] if config.truncation == "left" else ids[:limit]
        text = tokenizer.decode(ids)
    return PromptSample(
        index,
        tuple(ids),
        text,
        prompt.data_source,
        prompt.ground_truth,
        prompt.extra_info,
        prompt.file,
        prompt.row,
        prompt.messages,
    )
