"""The switches of one step, of all ranks, and what they say as metrics."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence

from rlhf_npu.hybrid.ledger import Ledger
from rlhf_npu.hybrid.switch_report import SwitchReport
from rlhf_npu.trainer.step_memory import GB, memory_metrics

# One report a rank, in the order of the ranks.
Entry = Sequence[SwitchReport]
PHASES = ("sleep", "wake_up", "reshard")


class StepSwitches:
    """The stages that were entered in a span of time, in order; mostly the span is a step.

    Attributes:
        name: what the span is called, such as "step 3".
        began, ended: the driver's `time.time()`; while it lasts, `ended` is None.
        before: the entry before its first one, if there was any: from what memory it came.
        entries: one for each stage entered.
    """

    def __init__(self, name: str, began: float, before: Entry | None = None) -> None:
        self.name = name
        self.began = began
        self.ended: float | None = None
        self.before = before
        self.entries: list[Entry] = []

    def add(self, reports: Entry) -> None:
        """All ranks have entered a stage."""
        self.entries.append(reports)

    def of_rank(self, rank: int) -> list[SwitchReport]:
        """The reports of one rank."""
        return [entry[rank] for entry in self.entries]

    def ledger_before(self, rank: int) -> Ledger | None:
        """The memory of a rank when the span began, if it is known."""
        return None if self.before is None else self.before[rank].after

    def first_ranks(self, count: int) -> StepSwitches:
        """The same of the first `count` ranks only."""
        kept = StepSwitches(self.name, self.began, None if self.before is None else self.before[:count])
        kept.ended = self.ended
        kept.entries = [entry[:count] for entry in self.entries]
        return kept

    def metrics(self) -> dict[str, float]:
        """Seconds of the phases, what the reshard moved, and the memory of each stage.

        `switch_s/<stage>/<phase>`: seconds on the way into a stage, on the slowest rank, since the others wait for it.
        `timing_s/{sleep,wake_up,reshard}`: their sums over the stages; zero where nothing had to.
        `reshard/version`, and `reshard/gb` that moved on all ranks. Memory: see `step_memory.memory_metrics`.
        """
        metrics: dict[str, float] = defaultdict(float)
        metrics |= {f"timing_s/{phase}": 0.0 for phase in PHASES}
        for entry in self.entries:
            for phase, seconds in _slowest(entry).items():
                metrics[f"switch_s/{entry[0].stage.value}/{phase}"] += seconds
                metrics[f"timing_s/{phase}"] += seconds
            reshards = [report.reshard for report in entry if report.reshard is not None]
            if reshards:
                metrics["reshard/version"] = reshards[0].version
                metrics["reshard/gb"] += sum(reshard.moved_bytes for reshard in reshards) / GB
        return dict(metrics) | memory_metrics(itertools.chain.from_iterable(self.entries))


def _slowest(entry: Entry) -> dict[str, float]:
    """Seconds of each kind of phase on the rank where it took longest."""
    slowest: dict[str, float] = {}
    for report in entry:
        seconds: dict[str, float] = defaultdict(float)
        for phase in report.phases:
            seconds[phase.name] += phase.seconds
        for name, value in seconds.items():
            slowest[name] = max(slowest.get(name, 0.0), value)
    return slowest
