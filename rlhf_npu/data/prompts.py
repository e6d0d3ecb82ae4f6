"""Prompts from Parquet or JSON files, as token ids that fit the model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_npu.config import DataConfig
from rlhf_npu.data.chats import ChatRenderer, check_is_no_chat, without_nulls
from rlhf_npu.data.encoding import Ids, Limits, encode_each
from rlhf_npu.data.problems import DataProblems
from rlhf_npu.data.prompt_files import PromptBlock, PromptDataset, prompt_block, write_prompts
from rlhf_npu.data.records import Record
from rlhf_npu.data.sample import PromptSample
from rlhf_npu.data.tokenizing import Job, Place, collect
from rlhf_npu.data.values import check_depth, check_text
from rlhf_npu.edges import repr_of
from rlhf_npu.errors import DataError

__all__ = ["PromptDataset", "PromptSample", "collect_prompts", "load_prompts"]


@dataclass(frozen=True)
class _Prompt:
    """A checked record: where it stands, and its text."""

    location: str
    text: str
    is_chat: bool
    data_source: str
    ground_truth: Any
    extra_info: dict[str, Any]
    messages: list[dict[str, Any]] | None


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
    limits = Limits(config.max_prompt_length, config.filter_overlong_prompts, config.truncation)
    return collect(PromptJob(tokenizer, "prompts", limits, config.prompt_key, keeps_messages), files, problems)


@dataclass(frozen=True)
class PromptJob(Job[PromptBlock, PromptDataset]):
    """How records become prompts."""

    folder = "prompts"
    noun = "prompts"
    sources = ("prompt_files", "prompts", "sample")

    limits: Limits
    prompt_key: str
    keeps_messages: bool

    @property
    def settings(self) -> tuple[Any, ...]:
        return self.limits, self.prompt_key, self.keeps_messages

    def encoder(self) -> PromptEncoder:
        return PromptEncoder(self)

    def write(self, folder: Path, blocks: Iterable[PromptBlock]) -> None:
        write_prompts(folder, blocks)

    def opened(self, folder: Path, files: Sequence[str]) -> PromptDataset:
        return PromptDataset(folder, files)

    def all_overlong(self, count: int) -> str:
        return f"all {count} prompts are longer than data.max_prompt_length={self.limits.max_length} tokens; raise it"


class PromptEncoder:
    """Makes blocks of prompts of records."""

    def __init__(self, job: PromptJob) -> None:
        self._tokenizer, self._limits, self._key = job.tokenizer, job.limits, job.prompt_key
        self._keeps_messages = job.keeps_messages
        self._chats = ChatRenderer(job.tokenizer)
        self._cuts = not job.limits.filter_overlong and job.limits.truncation != "error"

    def block(self, records: Sequence[Place]) -> PromptBlock:
        """The prompts of records, each with the index of its file."""
        problems: dict[int, str] = {}
        prompts: dict[int, _Prompt] = {}
        for index, (_, record) in enumerate(records):
            try:
                prompts[index] = _check(record, self._chats, self._key, self._keeps_messages)
            except DataError as error:
                problems[index] = str(error)
        encoded = self._encoded(prompts)
        problems |= {index: str(each) for index, each in encoded.items() if isinstance(each, DataError)}
        right = {index: each for index, each in encoded.items() if not isinstance(each, DataError)}
        too_long = [index for index, ids in right.items() if len(ids) > self._limits.max_length]
        kept = [index for index in right if self._cuts or index not in too_long]
        samples = [self._sample(prompts[index], right[index]) for index in kept]
        block = prompt_block(samples, [(records[index][0], records[index][1].row) for index in kept])
        block.problems = problems
        if self._cuts:
            block.truncated = len(too_long)
        elif self._limits.filter_overlong:
            block.skipped = len(too_long)
        else:
            block.overlong = {index: self._refusal(prompts[index], right[index]) for index in too_long}
        return block

    def _encoded(self, prompts: dict[int, _Prompt]) -> dict[int, Ids | DataError]:
        """The ids of each prompt, or what is wrong with it. A chat template writes its special tokens itself."""
        encoded: dict[int, Ids | DataError] = {}
        for is_chat in (False, True):
            group = [index for index, prompt in prompts.items() if prompt.is_chat == is_chat]
            rows = encode_each(self._tokenizer, [prompts[index].text for index in group], special=not is_chat)
            encoded |= {index: _ids_or_error(prompts[index], row) for index, row in zip(group, rows, strict=True)}
        return {index: encoded[index] for index in prompts}

    def _sample(self, prompt: _Prompt, ids: Ids) -> PromptSample:
        """A sample that is cut to the limit; its place among the others is not known here."""
        text, limit = prompt.text, self._limits.max_length
        if len(ids) > limit:
            ids = ids[-limit:] if self._limits.truncation == "left" else ids[:limit]
            text = self._tokenizer.decode(ids)
        return PromptSample(
            -1,
            tuple(ids),
            text,
            prompt.data_source,
            prompt.ground_truth,
            prompt.extra_info,
            messages=prompt.messages,
        )

    def _refusal(self, prompt: _Prompt, ids: Ids) -> str:
        return (
            f"{prompt.location}: {len(ids)} tokens, more than data.max_prompt_length={self._limits.max_length}; raise "
            "it, set data.filter_overlong_prompts=true to skip such prompts, or data.truncation=left|right to cut"
        )


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
    return _Prompt(location, text, is_chat, data_source, ground_truth, extra_info, messages)


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


def _ids_or_error(prompt: _Prompt, row: Ids | str) -> Ids | DataError:
    if isinstance(row, str):
        return DataError(f"{prompt.location}: {row}")
    if not row:
        return DataError(f"{prompt.location}: the prompt {prompt.text[:80]!r} has no tokens; it needs at least one")
    return row
