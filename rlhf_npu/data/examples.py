"""Pairs, single completions and conversations from files, as token ids that are made once and then kept."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import tokenizers
import transformers
from filelock import FileLock
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from transformers import PreTrainedTokenizerBase

from rlhf_npu.config.offline_data import OfflineDataConfig
from rlhf_npu.data.atomic_folder import atomic_folder
from rlhf_npu.data.builtin import CACHE_VARIABLE, cache_folder
from rlhf_npu.data.chats import ChatRenderer
from rlhf_npu.data.drafts import COMPLETIONS, Draft, Drafter, Kind
from rlhf_npu.data.encoding import Encoder, Limits
from rlhf_npu.data.example_files import Block, ExampleDataset, block_of, write_examples
from rlhf_npu.data.problems import DataProblems
from rlhf_npu.data.records import Record, read_records
from rlhf_npu.data.turns import TurnFinder
from rlhf_npu.edges import errors_as, one_line
from rlhf_npu.errors import DataError

__all__ = ["ExampleDataset", "Kind", "collect_examples", "load_examples"]

CHUNK_RECORDS = 256
BYTES_FOR_PROCESSES = 32 << 20
"""Files of less are tokenized in this process: others take seconds to start."""
MOST_PROCESSES = 16
# What decides the tokens; a change of one makes the kept ones useless.
_SOURCES = ("chats", "drafts", "encoding", "example_files", "examples", "records", "turns", "values")
Place = tuple[int, Record]


@dataclass(frozen=True)
class Job:
    """How records become examples: all that a process needs to know."""

    kind: Kind
    tokenizer: PreTrainedTokenizerBase
    limits: Limits
    train_on: str


class RecordEncoder:
    """Makes blocks of examples of records."""

    def __init__(self, job: Job) -> None:
        chats = ChatRenderer(job.tokenizer)
        turns = TurnFinder(chats, job.tokenizer.eos_token, job.train_on)
        self._drafter = Drafter(job.kind, chats, turns)
        self._encoder = Encoder(job.tokenizer, job.limits)
        self._pieces = 1 + COMPLETIONS[job.kind]

    def block(self, records: Sequence[Place]) -> Block:
        """The examples of records, each with the index of its file."""
        problems: dict[int, str] = {}
        drafts: dict[int, Draft] = {}
        for index, (_, record) in enumerate(records):
            try:
                drafts[index] = self._drafter.draft(record)
            except DataError as error:
                problems[index] = str(error)
        encoded = dict(zip(drafts, self._encoder.encode(list(drafts.values())), strict=True))
        problems |= {index: str(each) for index, each in encoded.items() if isinstance(each, DataError)}
        right = {index: each for index, each in encoded.items() if not isinstance(each, DataError)}
        kept = {index: each.example for index, each in right.items() if each.example is not None}
        places = [(records[index][0], records[index][1].row) for index in kept]
        block = block_of(list(kept.values()), places, self._pieces)
        for row, index in enumerate(kept):
            block.labels[row], block.margins[row] = drafts[index].label, drafts[index].margin
        block.skipped = len(right) - len(kept)
        block.truncated = sum(each.truncated for each in right.values())
        block.problems = [problems[index] for index in sorted(problems)]
        return block


def load_examples(
    kind: Kind, files: Sequence[str], tokenizer: PreTrainedTokenizerBase, config: OfflineDataConfig
) -> ExampleDataset:
    """Load, check and tokenize examples; those made before of the same files in the same way are taken as they are.

    A record of `pairs` has `chosen` and `rejected`, and `prompt` unless the two begin alike; one of `unpaired` has
    `prompt`, `completion` and `label`; one of `sft` has `messages`, `prompt` and `completion`, or `text`. See
    docs/data_and_rewards.md.

    Raises:
        DataError: a file is missing, of another kind, malformed or empty; a record has another form, holds nothing to
            learn or to predict it from, or is too long and neither skipped nor truncated; the template or the tokenizer
            fails on it, or what is trained cannot be told; nothing is left; the examples cannot be kept. Names file and
            row, from 1, of all that is wrong; see `DataProblems`.
        ModelError: the chat template takes too long.
    """
    problems = DataProblems()
    dataset = collect_examples(kind, files, tokenizer, config, problems)
    problems.check()
    return dataset


def collect_examples(
    kind: Kind,
    files: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    config: OfflineDataConfig,
    problems: DataProblems,
) -> ExampleDataset:
    """`load_examples` for one of several data sets: what is wrong is added to `problems`, for the caller to check.

    With problems, and without files, the data set is empty.
    """
    if not files:
        return _nothing(kind)
    limits = Limits(config.max_length, config.filter_overlong, config.truncation)
    job = Job(kind, tokenizer, limits, config.train_on)
    try:
        return _kept_or_made(job, files, problems)
    except OSError as error:
        raise DataError(
            f"{', '.join(files)}: their tokens cannot be kept: {one_line(error)}; set {CACHE_VARIABLE} to a folder "
            "with room that can be written"
        ) from error


def _kept_or_made(job: Job, files: Sequence[str], problems: DataProblems) -> ExampleDataset:
    cache = cache_folder() / "examples"
    cache.mkdir(parents=True, exist_ok=True)
    before = len(problems)
    key = _key(job, files, problems)
    if len(problems) > before:
        return _nothing(job.kind)
    folder = cache / f"{job.kind}-{key}"
    with FileLock(cache / f"{folder.name}.lock"):
        if not folder.is_dir() and not _made(job, files, folder, problems):
            return _nothing(job.kind)
    return ExampleDataset(folder, files)


def _made(job: Job, files: Sequence[str], folder: Path, problems: DataProblems) -> bool:
    """Write the examples into `folder`, or add to `problems` why they cannot be."""
    before = len(problems)
    with tempfile.TemporaryDirectory(prefix=".tokenizing.", dir=folder.parent) as staging:
        facts = write_examples(Path(staging), job.kind, _blocks(job, files, problems))
        if not facts.count and len(problems) == before:
            problems.add(
                f"{', '.join(files)}: all {facts.skipped} examples are longer than "
                f"data.max_length={job.limits.max_length} tokens; raise it"
            )
        if len(problems) > before:
            return False
        with atomic_folder(folder) as made:
            for file in Path(staging).iterdir():
                file.rename(made / file.name)
    return True


def _nothing(kind: Kind) -> ExampleDataset:
    with tempfile.TemporaryDirectory() as folder:
        write_examples(Path(folder), kind, [])
        return ExampleDataset(Path(folder), [])


def _blocks(job: Job, files: Sequence[str], problems: DataProblems) -> Iterator[Block]:
    """The blocks of the files' records, in order; what is wrong is added to `problems`."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.completed:,}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"tokenizing {job.kind}, once: records")
        for block in _encoded(job, files, _chunks(_records(files, problems))):
            for problem in block.problems:
                problems.add(problem)
            progress.advance(task, len(block.places) + block.skipped + len(block.problems))
            yield block


def _records(files: Sequence[str], problems: DataProblems) -> Iterator[Place]:
    for index, file in enumerate(files):
        before, records = len(problems), 0
        for record in read_records(file, problems):
            records += 1
            yield index, record
        if not records and len(problems) == before:
            problems.add(f"{file}: no examples; a file needs at least one record")


def _chunks(records: Iterator[Place]) -> Iterator[list[Place]]:
    while chunk := list(islice(records, CHUNK_RECORDS)):
        yield chunk


def _encoded(job: Job, files: Sequence[str], chunks: Iterator[list[Place]]) -> Iterator[Block]:
    count = _processes(job, files)
    if count == 1:
        yield from map(RecordEncoder(job).block, chunks)
        return
    print(f"tokenizing {', '.join(files)} in {count} processes, once", file=sys.stderr, flush=True)
    pool = ProcessPoolExecutor(count, get_context("spawn"), _start_process, (job,))
    try:
        yield from _in_order(pool, chunks, 2 * count)
    except BrokenProcessPool as error:
        raise DataError(
            f"{', '.join(files)}: a process that tokenizes them died; is there too little memory for {count} of them?"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(pool: ProcessPoolExecutor, chunks: Iterator[list[Place]], ahead: int) -> Iterator[Block]:
    """The chunks' blocks, in order, with at most `ahead` chunks under way."""
    waiting: deque[Future[Block]] = deque()
    for chunk in chunks:
        waiting.append(pool.submit(_block, chunk))
        if len(waiting) == ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _processes(job: Job, files: Sequence[str]) -> int:
    """How many processes tokenize; one where the tokenizer's class is a model's own and may not be found in others."""
    size = sum(Path(file).expanduser().stat().st_size for file in files)
    if size < BYTES_FOR_PROCESSES or not type(job.tokenizer).__module__.startswith("transformers."):
        return 1
    return min(len(os.sched_getaffinity(0)), MOST_PROCESSES)


_encoder: RecordEncoder | None = None


def _start_process(job: Job) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process a core already
    _encoder = RecordEncoder(job)


def _block(records: list[Place]) -> Block:
    assert _encoder is not None
    return _encoder.block(records)


def _key(job: Job, files: Sequence[str], problems: DataProblems) -> str:
    """A name for the examples: what they are made of, and by what. Files that cannot be read are problems."""
    digest = hashlib.sha256(repr((job.kind, job.limits, job.train_on, len(files))).encode())
    digest.update(f"{transformers.__version__} {tokenizers.__version__}".encode())
    for source in _SOURCES:
        digest.update(Path(__file__).with_name(f"{source}.py").read_bytes())
    digest.update(_tokenizer_digest(job.tokenizer))
    for file in files:
        digest.update(_file_digest(file, problems))
    return digest.hexdigest()[:24]


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> bytes:
    """Of all that the tokenizer would be loaded from again, its chat template included."""
    digest = hashlib.sha256(type(tokenizer).__qualname__.encode())
    with tempfile.TemporaryDirectory() as folder:
        what = f"the tokenizer of {tokenizer.name_or_path!r} cannot be saved to be told from others"
        with errors_as(DataError, what):
            tokenizer.save_pretrained(folder)
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.digest()


def _file_digest(file: str, problems: DataProblems) -> bytes:
    try:
        path = Path(file).expanduser()
        with path.open("rb") as content:
            return path.suffix.encode() + hashlib.file_digest(content, "sha256").digest()
    except (OSError, RuntimeError):
        list(read_records(file, problems))
        return b""
