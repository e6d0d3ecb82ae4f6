"""What is kept of all switches of a run, for the trace and the picture at its end."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from rlhf_npu.trainer.chrome_trace import write_trace
from rlhf_npu.trainer.switch_times import Entry, StepSwitches

KEPT_FIRST = 100
KEPT_LAST = 100
KEPT_RANKS = 16


class Warns(Protocol):
    """Tells a person."""

    def warn(self, *warnings: str) -> None:
        """Say each of them."""


class SwitchRecord:
    """Collects every stage that is entered, and on leaving the context writes the trace, however the run ends.

    What is entered outside of a step, for validation or saving, counts for no step's metrics and is in the trace under
    a name of its own. Of a long run the trace has the first and the last hundred spans of time, of a large one the
    first 16 ranks.

    Args:
        trace: the file that is written.
        terminal: hears of a trace that cannot be written: it must not cost the run.
    """

    def __init__(self, trace: Path, terminal: Warns) -> None:
        self.last_step: StepSwitches | None = None
        self._trace = trace
        self._terminal = terminal
        self._current = StepSwitches("before step 1", time.time())
        self._first: list[StepSwitches] = []
        self._last: deque[StepSwitches] = deque(maxlen=KEPT_LAST)

    def __enter__(self) -> SwitchRecord:
        return self

    def __exit__(self, *_: object) -> None:
        self._begin("")
        kept = [*self._first, *self._last]
        if not kept:
            return
        try:
            write_trace(kept, self._trace)
        except OSError as error:
            self._terminal.warn(f"{self._trace} could not be written: {error.strerror}")

    @contextmanager
    def step(self, number: int) -> Iterator[StepSwitches]:
        """What is entered within is the step's."""
        current = self._begin(f"step {number}")
        try:
            yield current
        finally:
            self._begin(f"after step {number}")
        self.last_step = current

    def add(self, reports: Entry) -> None:
        """All ranks have entered a stage outside of a step: one report each."""
        if not self._current.entries:
            self._current.began = max(self._current.began, min(report.began for report in reports))
        self._current.add(reports)

    def _begin(self, name: str) -> StepSwitches:
        """The next span begins, and the one before it ends."""
        now, over = time.time(), self._current
        over.ended = now
        if over.entries:
            (self._first if len(self._first) < KEPT_FIRST else self._last).append(over.first_ranks(KEPT_RANKS))
        self._current = StepSwitches(name, now, before=over.entries[-1] if over.entries else over.before)
        return self._current
