"""The stages and switches of a run as a Chrome trace, which ui.perfetto.dev and chrome://tracing open.

The format is the JSON object of the Trace Event Format
(https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU), with its complete events ("X"),
counters ("C") and metadata ("M"); what Perfetto reads of it is on
https://perfetto.dev/docs/getting-started/other-formats#chrome-json-format. Events of a row must not overlap, so times
are whole microseconds; and Perfetto takes process 0 and thread 0 for the idle task and names threads by their number
alone, so processes begin at 1 and no two rows of a trace share a number.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlhf_npu.hybrid.switch_report import SwitchReport
from rlhf_npu.trainer.memory_timeline import memory_timeline
from rlhf_npu.trainer.switch_times import StepSwitches

Event = dict[str, Any]
ROWS = ("steps", "stages", "switches")


def write_trace(steps: Sequence[StepSwitches], file: Path) -> None:
    """Write the spans, of which each is over, in order of time; ranks are processes, and time 0 is the first's begin.

    Each rank has a row of steps, one of stages, one of the phases of switches, and counters of bytes: `mapped` for
    each tag, `used` by the driver's count.

    Raises:
        OSError: the file cannot be written.
    """
    zero = steps[0].began
    trace = {
        "traceEvents": list(trace_events(steps)),
        "displayTimeUnit": "ms",
        "otherData": {"time 0": datetime.fromtimestamp(zero, UTC).isoformat()},
    }
    file.write_text(json.dumps(trace))


def trace_events(steps: Sequence[StepSwitches]) -> Iterator[Event]:
    """The events of `write_trace`."""
    ranks = max((len(entry) for step in steps for entry in step.entries), default=0)
    for rank in range(ranks):
        process = _Process(rank, zero=steps[0].began)
        yield from process.names()
        for place, step in enumerate(steps):
            following = next((later.of_rank(rank)[0].began for later in steps[place + 1 :] if later.entries), None)
            yield from process.events(step, following)


class _Process:
    """The events of one rank."""

    def __init__(self, rank: int, zero: float) -> None:
        self._rank = rank
        self._zero = zero

    def names(self) -> Iterator[Event]:
        """What the process and its rows are called, and their order."""
        yield self._metadata("process_name", 0, {"name": f"rank {self._rank}"})
        yield self._metadata("process_sort_index", 0, {"sort_index": self._rank})
        for row, name in enumerate(ROWS):
            yield self._metadata("thread_name", row, {"name": name})
            yield self._metadata("thread_sort_index", row, {"sort_index": row})

    def events(self, step: StepSwitches, following: float | None) -> Iterator[Event]:
        """A span, its stages, its phases and the bytes; `following` is when the rank left its last stage, if it did."""
        assert step.ended is not None
        yield self._complete("steps", step.name, step.began, step.ended)
        reports = step.of_rank(self._rank)
        end = step.ended if following is None else min(step.ended, following)
        ends = [*(report.began for report in reports[1:]), end]
        for report, left in zip(reports, ends, strict=True) if reports else ():
            yield self._complete("stages", report.stage.value, report.entered, left)
            yield from self._phases(report)
            yield self._counter("used", report.entered, {"bytes": report.after.used})
        for point in memory_timeline(reports, step.ledger_before(self._rank)):
            yield self._counter("mapped", point.time, point.mapped)

    def _phases(self, report: SwitchReport) -> Iterator[Event]:
        for phase in report.phases:
            name = " ".join((phase.name, *phase.tags))
            yield self._complete("switches", name, phase.start, phase.end) | {"args": {"for": report.stage.value}}

    def _complete(self, row: str, name: str, start: float, end: float) -> Event:
        begun = self._microseconds(start)
        duration = max(0, self._microseconds(end) - begun)
        return self._event("X", name, ROWS.index(row)) | {"cat": row, "ts": begun, "dur": duration}

    def _counter(self, name: str, time: float, series: Mapping[str, int]) -> Event:
        return self._event("C", name, 0) | {"ts": self._microseconds(time), "args": dict(series)}

    def _metadata(self, name: str, row: int, args: dict[str, Any]) -> Event:
        return self._event("M", name, row) | {"args": args}

    def _event(self, kind: str, name: str, row: int) -> Event:
        process = self._rank + 1
        return {"ph": kind, "name": name, "pid": process, "tid": process * 1000 + row}

    def _microseconds(self, time: float) -> int:
        return round((time - self._zero) * 1e6)
