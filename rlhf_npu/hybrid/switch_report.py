"""What a switch did: seconds of its phases, and the memory that it left."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_npu.hybrid.ledger import Ledger
from rlhf_npu.hybrid.resharding.reshard import ReshardReport
from rlhf_npu.hybrid.switch_plan import Stage


@dataclass(frozen=True)
class PhaseTime:
    """One phase of a switch, as measured.

    Attributes:
        name: "sleep", "wake_up" or "reshard".
        tags: what slept or woke; none for a reshard.
        start: `time.time()` when it began: ranks of a node share that clock.
        seconds: how long it took.
    """

    name: str
    tags: tuple[str, ...]
    start: float
    seconds: float

    @property
    def end(self) -> float:
        """`time.time()` when it was done."""
        return self.start + self.seconds


@dataclass(frozen=True)
class StagePeak:
    """The most bytes of the device in use within a stage that is over; see `PeakMeter`."""

    stage: Stage
    used: int


@dataclass(frozen=True)
class SwitchReport:
    """One rank's way into a stage.

    Attributes:
        stage: what the device is for now.
        phases: what slept, woke and moved for it, in order; none where nothing had to.
        after: the memory when the phases were done.
        reshard: the reshard's report if there was one.
        entered: `time.time()` when the phases were done and the stage's own work began.
        left: the peak of the stage before this one; None for the first.
    """

    stage: Stage
    phases: tuple[PhaseTime, ...]
    after: Ledger
    reshard: ReshardReport | None
    entered: float
    left: StagePeak | None = None

    @property
    def began(self) -> float:
        """`time.time()` when the stage before this one was over."""
        return self.phases[0].start if self.phases else self.entered
