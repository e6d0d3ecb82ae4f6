"""Records in files that processes share: what a process needs of them is read when it is asked for."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar, overload

import numpy as np

from rlhf_npu.data.builtin import CACHE_VARIABLE
from rlhf_npu.errors import DataError

Kept = TypeVar("Kept")
_FACTS = "facts.json"


@dataclass(kw_only=True)
class Block:
    """What became of some records.

    Attributes:
        places: int64 (n, 2): index of the file, row there, of those that are kept.
        skipped, truncated: left out, and cut, for their length.
        problems: what is wrong with others, by their place among the records.
        overlong: by the same place, that they are too long where that is not allowed.
    """

    places: np.ndarray
    skipped: int = 0
    truncated: int = 0
    problems: dict[int, str] = field(default_factory=dict)
    overlong: dict[int, str] = field(default_factory=dict)


class MappedDataset(Sequence[Kept]):
    """Records in the order of their files.

    Attributes:
        facts: what is known of all of them.
        skipped: left out because they are too long.
        truncated: cut because they are too long.
    """

    def __init__(self, folder: Path, files: Sequence[str], count: int | None = None) -> None:
        """Open what was written into `folder`: all records, or the first `count` if there are more."""
        self.facts: dict[str, Any] = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
        self.skipped, self.truncated = int(self.facts["skipped"]), int(self.facts["truncated"])
        self._folder = folder
        self._files = tuple(str(Path(file).expanduser()) for file in files)
        self._places = mapped(folder / "places.bin", "int64").reshape(-1, 2)
        self._count = len(self._places) if count is None else min(count, len(self._places))

    def __len__(self) -> int:
        return self._count

    def __reduce__(self) -> tuple[Any, ...]:
        # By name: another process opens the files itself instead of getting a copy of them.
        return _open_first, (type(self), self._folder, self._files, self._count)

    @property
    def digest(self) -> str:
        """What the records are made of, and how many of them there are."""
        return f"{self._folder.name}-{self._count}"

    def first(self, count: int) -> Self:
        """The first `count` records, or all if there are fewer."""
        if count >= self._count:  # an empty data set has no folder that could be opened again
            return self
        return type(self)(self._folder, self._files, count)

    @overload
    def __getitem__(self, index: int) -> Kept: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[Kept, ...]: ...

    def __getitem__(self, index: int | slice) -> Kept | tuple[Kept, ...]:
        if isinstance(index, slice):
            return tuple(self._read(place) for place in range(*index.indices(self._count)))
        return self._read(range(self._count)[index])

    def __iter__(self) -> Iterator[Kept]:
        return map(self._read, range(self._count))

    def location(self, index: int) -> str:
        """`file:row` of a record, for people to read."""
        file, row = self._places[range(self._count)[index]]
        return f"{self._files[int(file)]}:{row}"

    @abstractmethod
    def _read(self, place: int) -> Kept:
        """The record at `place`, which is one of those that there are."""


def _open_first(kind: type[MappedDataset[Any]], folder: Path, files: Sequence[str], count: int) -> MappedDataset[Any]:
    if not folder.is_dir():
        raise DataError(f"{folder}: not on this machine; set {CACHE_VARIABLE} to a folder that all nodes share")
    return kind(folder, files, count)


class Columns:
    """Files that grow by a block at a time: `NAME.bin` of each column."""

    def __init__(self, folder: Path, names: Sequence[str], stack: ExitStack) -> None:
        self._files = {name: stack.enter_context((folder / f"{name}.bin").open("wb")) for name in names}

    def add(self, columns: Mapping[str, np.ndarray | bytes]) -> None:
        """Append to each column what `columns` has of it."""
        for name, file in self._files.items():
            column = columns[name]
            file.write(column if isinstance(column, bytes) else np.ascontiguousarray(column).tobytes())


@contextmanager
def columns_in(folder: Path, *names: str) -> Iterator[Columns]:
    """Columns of a folder, to be written inside."""
    with ExitStack() as stack:
        yield Columns(folder, names, stack)


def write_facts(folder: Path, **facts: Any) -> None:
    """Write what is known of all records; `skipped` and `truncated` are among that."""
    (folder / _FACTS).write_text(json.dumps(facts), encoding="utf-8")


def mapped(path: Path, dtype: str) -> np.ndarray:
    """An array of a file, which takes memory of the process only where it is read."""
    if not path.stat().st_size:
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype, mode="r"))
