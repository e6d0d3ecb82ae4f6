"""Records of files, made into tokens once by several processes, and then kept."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process, resource_tracker
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import tokenizers
import transformers
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from transformers import PreTrainedTokenizerBase

from rlhf_npu.data.atomic_folder import atomic_folder
from rlhf_npu.data.builtin import CACHE_VARIABLE, cache_folder
from rlhf_npu.data.mapped import Block, MappedDataset
from rlhf_npu.data.problems import DataProblems
from rlhf_npu.data.records import Record, read_records
from rlhf_npu.edges import errors_as, one_line
from rlhf_npu.errors import DataError

CHUNK_RECORDS = 256
BYTES_FOR_PROCESSES = 32 << 20
"""Files of less are tokenized in this process: others take seconds to start."""
MOST_PROCESSES = 16
SECONDS_BETWEEN_LINES = 30.0
Place = tuple[int, Record]
Stamp = tuple[int, int, int] | None
Made = TypeVar("Made", bound=Block)
Encoded_co = TypeVar("Encoded_co", bound=Block, covariant=True)
Dataset = TypeVar("Dataset", bound=MappedDataset[Any])


class BlockEncoder(Protocol[Encoded_co]):
    """Makes blocks of records."""

    def block(self, records: Sequence[Place]) -> Encoded_co:
        """What becomes of records, each with the index of its file."""


@dataclass(frozen=True)
class Job(ABC, Generic[Made, Dataset]):
    """How records become what is kept: all that a process needs to know.

    Attributes:
        folder: of the cache, for what all jobs of a class make.
        kind: of the records, a part of the kept folder's name.
        noun: what is kept, in words.
        sources: modules of this package that decide what is kept, beside those that decide it for all jobs.
    """

    folder: ClassVar[str]
    noun: ClassVar[str]
    sources: ClassVar[tuple[str, ...]]

    tokenizer: PreTrainedTokenizerBase
    kind: str

    @property
    @abstractmethod
    def settings(self) -> tuple[Any, ...]:
        """What decides what is kept, beside files and tokenizer; its `repr` tells it from others."""

    @abstractmethod
    def encoder(self) -> BlockEncoder[Made]:
        """What makes blocks, in the process that calls this."""

    @abstractmethod
    def write(self, folder: Path, blocks: Iterable[Made]) -> None:
        """Write blocks as files, holding one in memory at a time."""

    @abstractmethod
    def opened(self, folder: Path, files: Sequence[str]) -> Dataset:
        """What was written."""

    @abstractmethod
    def all_overlong(self, count: int) -> str:
        """That all `count` records are too long, for people to read."""


# What decides the tokens of all jobs; a change of one makes the kept ones useless.
_SOURCES = ("chats", "encoding", "mapped", "records", "tokenizing", "values")


def collect(job: Job[Made, Dataset], files: Sequence[str], problems: DataProblems) -> Dataset:
    """What a job makes of files: what was kept of the same files, else what is made, and then kept.

    What is wrong is added to `problems`; with problems, and without files, the data set is empty.

    Raises:
        DataError: it cannot be kept, the tokenizer cannot be told from others, or a process that tokenizes died.
        ModelError: the chat template takes too long.
    """
    if not files:
        return _nothing(job)
    try:
        return _kept_or_made(job, files, problems)
    except OSError as error:
        raise DataError(
            f"{', '.join(files)}: their tokens cannot be kept: {one_line(error)}; set {CACHE_VARIABLE} to a folder "
            "with room that can be written"
        ) from error


def _kept_or_made(job: Job[Made, Dataset], files: Sequence[str], problems: DataProblems) -> Dataset:
    cache = cache_folder() / job.folder
    cache.mkdir(parents=True, exist_ok=True)
    stamps, unreadable = _stamps(files), DataProblems()
    key = _key(job, files, unreadable)
    if len(unreadable):
        _add_all(job, files, unreadable, problems)
        return _nothing(job)
    folder = cache / f"{job.kind}-{key}"
    with _alone(folder, files):
        if not folder.is_dir() and not _made(job, files, folder, problems, stamps):
            return _nothing(job)
    return job.opened(folder, files)


@contextmanager
def _alone(folder: Path, files: Sequence[str]) -> Iterator[None]:
    """The lock of a kept folder; whoever waits for another run is told so."""
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        print(f"waiting for another run that tokenizes {', '.join(files)}", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _made(
    job: Job[Made, Dataset],
    files: Sequence[str],
    folder: Path,
    problems: DataProblems,
    stamps: list[Stamp],
) -> bool:
    """Write what is to be kept into `folder`, or add to `problems` why it cannot be."""
    before = len(problems)
    prefix = f".tokenizing.{folder.name}."
    for left in folder.parent.glob(f"{prefix}*"):  # by a run that was killed: the lock is held here
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent) as staging:
        job.write(Path(staging), _blocks(job, files, problems))
        made = job.opened(Path(staging), files)
        if not len(made) and len(problems) == before:
            problems.add(f"{', '.join(files)}: {job.all_overlong(made.skipped)}")
        if len(problems) > before:
            return False
        if _stamps(files) != stamps:
            raise DataError(f"{', '.join(files)}: changed while they were read; start again when they are written")
        with atomic_folder(folder) as whole:
            for file in Path(staging).iterdir():
                file.rename(whole / file.name)
    return True


def _add_all(job: Job[Made, Dataset], files: Sequence[str], unreadable: DataProblems, problems: DataProblems) -> None:
    """Add what is wrong with all files, of which some cannot be read; only that if the others would take long."""
    before = len(problems)
    if _size(files) < BYTES_FOR_PROCESSES:
        for _ in _blocks(job, files, problems):
            pass
    if len(problems) == before:
        problems.include(unreadable)


def _nothing(job: Job[Made, Dataset]) -> Dataset:
    with tempfile.TemporaryDirectory() as folder:
        job.write(Path(folder), [])
        return job.opened(Path(folder), [])


@dataclass
class _Chunk:
    """Some records in order, and what could not be read before the one of a place."""

    records: list[Place] = field(default_factory=list)
    unread: dict[int, DataProblems] = field(default_factory=dict)

    def note(self, found: DataProblems) -> None:
        if len(found):
            self.unread.setdefault(len(self.records), DataProblems()).include(found.taken())

    def add_problems(self, block: Block, problems: DataProblems) -> None:
        """Add what is wrong with these records, of which `block` was made, in their order."""
        for place in sorted(self.unread.keys() | block.problems.keys()):
            if place in self.unread:
                problems.include(self.unread[place])
            if place in block.problems:
                problems.add(block.problems[place])


def _blocks(job: Job[Made, Dataset], files: Sequence[str], problems: DataProblems) -> Iterator[Made]:
    """The blocks of the files' records, in order; what is wrong is added to `problems`, what is too long last."""
    overlong = DataProblems()
    with _shown_progress(f"tokenizing {job.kind}, once: records") as advance:
        for chunk, block in _encoded(job, files, _chunks(job, files)):
            chunk.add_problems(block, problems)
            for place in sorted(block.overlong):
                overlong.add(block.overlong[place])
            advance(len(chunk.records))
            yield block
    problems.include(overlong)


class _Advance(Protocol):
    def __call__(self, records: int) -> None: ...


@contextmanager
def _shown_progress(what: str) -> Iterator[_Advance]:
    """Shows how many records are done: a moving line on a terminal, elsewhere a line every half minute."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TextColumn("{task.completed:,}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what)
        start = said = time.monotonic()
        done = 0

        def advance(records: int) -> None:
            nonlocal done, said
            done += records
            progress.advance(task, records)
            now = time.monotonic()
            if not console.is_terminal and now - said > SECONDS_BETWEEN_LINES:
                said = now
                print(f"{what}: {done:,} in {now - start:.0f} s", file=sys.stderr, flush=True)

        yield advance


def _chunks(job: Job[Made, Dataset], files: Sequence[str]) -> Iterator[_Chunk]:
    chunk = _Chunk()
    for index, file in enumerate(files):
        records, found = 0, DataProblems()
        for record in read_records(file, found):
            records += 1
            chunk.note(found)
            chunk.records.append((index, record))
            if len(chunk.records) == CHUNK_RECORDS:
                yield chunk
                chunk = _Chunk()
        if not records and not len(found):
            found.add(f"{file}: no {job.noun}; a file needs at least one record")
        chunk.note(found)
    if chunk.records or chunk.unread:
        yield chunk


def _encoded(job: Job[Made, Dataset], files: Sequence[str], chunks: Iterator[_Chunk]) -> Iterator[tuple[_Chunk, Made]]:
    count = _processes(job, files)
    if count == 1:
        encoder = job.encoder()
        yield from ((chunk, encoder.block(chunk.records)) for chunk in chunks)
        return
    print(f"tokenizing {', '.join(files)} in {count} processes, once", file=sys.stderr, flush=True)
    resource_tracker.ensure_running()  # which would undo what keeps Ctrl-C from processes that start with it
    pool = ProcessPoolExecutor(count, get_context("spawn"), _start_process, (job,))
    try:
        yield from _in_order(pool, chunks, 2 * count)
    except BrokenProcessPool as error:
        raise DataError(
            f"{', '.join(files)}: a process that tokenizes them died; is there too little memory for {count} of them?"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Processes started inside never get Ctrl-C, which reaches all of a terminal's: the one that asked ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _in_order(pool: ProcessPoolExecutor, chunks: Iterator[_Chunk], ahead: int) -> Iterator[tuple[_Chunk, Any]]:
    """The chunks' blocks, in order, with at most `ahead` chunks under way."""
    waiting: deque[tuple[_Chunk, Future[Any]]] = deque()
    for chunk in chunks:
        with _deaf_to_ctrl_c():  # it may start a process
            waiting.append((chunk, pool.submit(_block, chunk.records)))
        if len(waiting) == ahead:
            yield _result(waiting)
    while waiting:
        yield _result(waiting)


def _result(waiting: deque[tuple[_Chunk, Future[Any]]]) -> tuple[_Chunk, Any]:
    chunk, future = waiting.popleft()
    return chunk, future.result()


def _processes(job: Job[Made, Dataset], files: Sequence[str]) -> int:
    """How many processes tokenize; one where the tokenizer's class is a model's own and may not be found in others."""
    if _size(files) < BYTES_FOR_PROCESSES or not type(job.tokenizer).__module__.startswith("transformers."):
        return 1
    return min(len(os.sched_getaffinity(0)), MOST_PROCESSES)


_encoder: BlockEncoder[Any] | None = None


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _start_process(job: Job[Any, Any]) -> None:
    global _encoder
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process a core already
    _encoder = job.encoder()


def _block(records: list[Place]) -> Any:
    assert _encoder is not None
    return _encoder.block(records)


def _key(job: Job[Made, Dataset], files: Sequence[str], problems: DataProblems) -> str:
    """A name for what is kept: what it is made of, and by what. Files that cannot be read are problems."""
    digest = hashlib.sha256(repr((job.kind, *job.settings, len(files))).encode())
    digest.update(f"{transformers.__version__} {tokenizers.__version__}".encode())
    for source in (*_SOURCES, *job.sources):
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


def _stamps(files: Sequence[str]) -> list[Stamp]:
    """What changes when a file does; None for one that is not there."""
    return [_stamp(file) for file in files]


def _size(files: Sequence[str]) -> int:
    return sum(stamp[1] for stamp in _stamps(files) if stamp is not None)


def _stamp(file: str) -> Stamp:
    try:
        status = Path(file).expanduser().stat()
    except (OSError, RuntimeError):
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _file_digest(file: str, problems: DataProblems) -> bytes:
    try:
        path = Path(file).expanduser()
        with path.open("rb") as content:
            return path.suffix.encode() + hashlib.file_digest(content, "sha256").digest()
    except (OSError, RuntimeError) as error:
        before = len(problems)
        for _ in read_records(file, problems):  # which says it in words
            break
        if len(problems) == before:
            problems.add(f"{file}: cannot be read: {one_line(error)}")
        return b""
