"""What is wrong with a data set, told at once instead of one fault a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rlhf_npu.errors import DataError

LISTED = 10


class DataProblems:
    """Collects faults; all are counted, the first `LISTED` are shown."""

    def __init__(self) -> None:
        self._shown: list[str] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, problem: str) -> None:
        """Count `problem`, which names its file and row."""
        self._count += 1
        if len(self._shown) < LISTED:
            self._shown.append(problem)

    def include(self, other: DataProblems) -> None:
        """Count those of `other` after those that are here."""
        self._count += other._count
        self._shown += other._shown[: LISTED - len(self._shown)]

    def taken(self) -> DataProblems:
        """What was found until now, which is then forgotten here."""
        found = DataProblems()
        found.include(self)
        self._shown, self._count = [], 0
        return found

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Add the `DataError` that the block raises."""
        try:
            yield
        except DataError as error:
            self.add(str(error))

    def check(self) -> None:
        """Raise what was found.

        Raises:
            DataError: the one problem, or a list of them.
        """
        if self._count == 1:
            raise DataError(self._shown[0])
        if self._count:
            more = [f"  and {self._count - LISTED:,} more"] if self._count > LISTED else []
            listed = [f"  {problem}" for problem in self._shown]
            raise DataError("\n".join([f"the data has {self._count:,} problems:", *listed, *more]))
