"""The trace of a run: what Perfetto needs to open it, what a person finds in it, and when it is written."""

from __future__ import annotations

import io
import itertools
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rlhf_npu.trainer.chrome_trace import write_trace
from rlhf_npu.trainer.switch_record import KEPT_FIRST, KEPT_LAST, KEPT_RANKS, SwitchRecord
from rlhf_npu.trainer.terminal import PPO_LINE, Terminal
from tests.trainer.switches import GENERATING, GIB, SCORING, START, generating, measured_step, scoring

Event = dict[str, Any]


def terminal() -> Terminal:
    return Terminal(1, PPO_LINE, Console(file=io.StringIO(), width=200))


def events_of(file: Path) -> list[Event]:
    return json.loads(file.read_text())["traceEvents"]


@pytest.fixture
def events(tmp_path: Path) -> list[Event]:
    first = measured_step("step 1")
    write_trace([first, measured_step("step 2", START + 10, first)], tmp_path / "trace.json")
    return events_of(tmp_path / "trace.json")


def row(events: list[Event], process: str, thread: str) -> list[Event]:
    """The complete events of a row, which metadata names, in order of time."""
    named = [event for event in events if event["ph"] == "M"]
    (pid,) = [event["pid"] for event in named if event["name"] == "process_name" and event["args"]["name"] == process]
    (tid,) = [
        event["tid"]
        for event in named
        if event["name"] == "thread_name" and event["args"]["name"] == thread and event["pid"] == pid
    ]
    found = [event for event in events if event["ph"] == "X" and (event["pid"], event["tid"]) == (pid, tid)]
    return sorted(found, key=lambda event: event["ts"])


def test_every_event_has_what_its_kind_needs(events: list[Event]) -> None:
    needed = {"X": {"ts", "dur", "cat"}, "C": {"ts", "args"}, "M": {"args"}}
    assert {event["ph"] for event in events} == needed.keys()
    for event in events:
        assert {"name", "pid", "tid"} | needed[event["ph"]] <= event.keys()
        assert event["pid"] > 0
        assert event.get("ts", 0) >= 0
        assert event.get("dur", 0) >= 0
    numbers = {(event["pid"], event["tid"]) for event in events}
    assert len({tid for _, tid in numbers} | {pid for pid, _ in numbers}) == len(numbers) + 2


def test_nothing_overlaps_within_a_row(events: list[Event]) -> None:
    rows = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            rows[event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    assert len(rows) == 6
    for spans in rows.values():
        spans.sort()
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def test_a_rank_has_rows_of_steps_stages_and_switches(events: list[Event]) -> None:
    assert [(event["name"], event["ts"], event["dur"]) for event in row(events, "rank 1", "steps")] == [
        ("step 1", 0, 10_000_000),
        ("step 2", 10_000_000, 10_000_000),
    ]
    stages = [(event["name"], event["ts"], event["dur"]) for event in row(events, "rank 1", "stages")]
    assert stages[:3] == [
        ("generate", 0, 6_000_000),
        ("old_log_prob", 7_000_000, 2_000_000),
        ("generate", 9_900_000, 100_000),
    ]
    switches = [(event["name"], event["dur"]) for event in row(events, "rank 1", "switches")]
    assert switches[:2] == [("sleep weights kv_cache", 600_000), ("wake_up actor.params", 400_000)]


def test_counters_follow_the_bytes_of_each_tag(events: list[Event]) -> None:
    mapped = [event for event in events if event["ph"] == "C" and event["name"] == "mapped" and event["pid"] == 1]
    during = {event["ts"]: event["args"] for event in mapped}
    assert during[0] == GENERATING
    assert during[6_500_000] == GENERATING | {"weights": 0, "kv_cache": 0}
    assert during[7_000_000] == SCORING
    used = [event["args"]["bytes"] for event in events if event["ph"] == "C" and event["name"] == "used"]
    assert used[:3] == [26 * GIB, 10 * GIB, 26 * GIB]


def test_a_rank_whose_clock_is_behind_the_drivers_has_no_stage_that_reaches_into_the_next_step(tmp_path: Path) -> None:
    first, second = measured_step("step 1"), measured_step("step 2", START + 10)
    first.ended = START + 10.5
    write_trace([first, second], tmp_path / "trace.json")
    stages = row(events_of(tmp_path / "trace.json"), "rank 0", "stages")
    assert stages[2]["ts"] + stages[2]["dur"] == stages[3]["ts"]


def test_what_comes_before_the_first_step_begins_with_its_first_switch(tmp_path: Path) -> None:
    with SwitchRecord(tmp_path / "trace.json", terminal()) as record:
        later = time.time() + 5
        record.add([scoring(0, later)])
    (before,) = row(events_of(tmp_path / "trace.json"), "rank 0", "steps")
    (switch, _) = row(events_of(tmp_path / "trace.json"), "rank 0", "switches")
    assert (before["name"], before["ts"]) == ("before step 1", switch["ts"]) == ("before step 1", 0)


def test_a_run_that_is_interrupted_leaves_its_trace(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"

    def run() -> None:
        with SwitchRecord(file, terminal()) as record:
            with record.step(1) as switches:
                switches.add([generating(0, START)])
            record.add([scoring(0, START)])
            with record.step(2) as switches:
                switches.add([generating(0, START)])
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    names = [event["name"] for event in row(events_of(file), "rank 0", "steps")]
    assert names == ["step 1", "after step 1", "step 2"]


def test_a_long_run_of_many_ranks_keeps_its_first_and_last_steps(tmp_path: Path) -> None:
    ranks, steps = KEPT_RANKS + 4, KEPT_FIRST + KEPT_LAST + 50
    with SwitchRecord(tmp_path / "trace.json", terminal()) as record:
        for step in range(1, steps + 1):
            with record.step(step) as switches:
                switches.add([generating(rank, START) for rank in range(ranks)])
    events = events_of(tmp_path / "trace.json")
    kept = [int(event["name"].removeprefix("step ")) for event in row(events, f"rank {KEPT_RANKS - 1}", "steps")]
    assert kept == [*range(1, KEPT_FIRST + 1), *range(steps - KEPT_LAST + 1, steps + 1)]
    assert len({event["pid"] for event in events}) == KEPT_RANKS
    assert record.last_step is not None
    assert len(record.last_step.of_rank(ranks - 1)) == 1


def test_a_trace_that_cannot_be_written_costs_a_warning_and_not_the_run(tmp_path: Path) -> None:
    screen = terminal()
    with SwitchRecord(tmp_path / "gone" / "trace.json", screen) as record, record.step(1) as switches:
        switches.add([generating(0, START)])
    assert isinstance(screen.console.file, io.StringIO)
    assert "trace.json could not be written: No such file" in screen.console.file.getvalue()
