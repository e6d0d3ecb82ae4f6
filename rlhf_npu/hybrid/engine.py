"""The hybrid engine: the sharding manager that turns one set of devices from generating to training and back."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from rlhf_npu.engines.rollout import RolloutEngine
from rlhf_npu.errors import SwitchError
from rlhf_npu.hybrid.ledger import Ledger, read_ledger
from rlhf_npu.hybrid.reshard import Resharder, ReshardReport
from rlhf_npu.hybrid.switch_plan import Action, Mode, Phase, SwitchPlan, plan_to_generate, plan_to_train
from rlhf_npu.platform import Platform


@dataclass
class SwitchReport:
    """What a switch did.

    Attributes:
        seconds: time of each action, keyed by its name; phases of one action add up.
        before, after: the memory around the switch.
        reshard: the reshard's report when the plan had one.
    """

    before: Ledger
    after: Ledger
    seconds: dict[str, float] = field(default_factory=dict)
    reshard: ReshardReport | None = None


class HybridEngine:
    """Executes switch plans, measures each phase, and refuses a plan that starts from the other mode.

    A phase that fails raises SwitchError and leaves the phases before it done: calling the same switch again
    starts over from the first phase, and each of them is idempotent.
    """

    def __init__(self, rollout: RolloutEngine, resharder: Resharder, sleep_level: int, platform: Platform) -> None:
        self._rollout = rollout
        self._resharder = resharder
        self._sleep_level = sleep_level
        self._platform = platform
        self.mode = Mode.GENERATE
        self._actions: dict[Action, Callable[[Phase], ReshardReport | None]] = {
            Action.SLEEP: self._sleep,
            Action.WAKE_UP: self._wake_up,
            Action.RESHARD: lambda _: self._resharder.reshard(),
        }

    def to_train(self) -> SwitchReport:
        """Put the rollout to sleep."""
        return self.execute(plan_to_train(self._sleep_level))

    def to_generate(self) -> SwitchReport:
        """Wake the rollout with the trainer's weights."""
        return self.execute(plan_to_generate())

    def execute(self, plan: SwitchPlan) -> SwitchReport:
        """Run the phases of `plan` in order.

        Raises:
            SwitchError: the engine is not in the plan's start mode, or a phase failed.
        """
        if self.mode is not plan.start:
            raise SwitchError(f"the engine is in mode {self.mode.value}; it cannot execute the plan {plan}")
        before = read_ledger(self._platform)
        report = SwitchReport(before, before)
        for phase in plan.phases:
            self._execute_phase(phase, report)
        self.mode = plan.end
        report.after = read_ledger(self._platform)
        return report

    def _execute_phase(self, phase: Phase, report: SwitchReport) -> None:
        start = time.perf_counter()
        try:
            resharded = self._actions[phase.action](phase)
            self._platform.synchronize()
        except Exception as error:
            raise SwitchError(f"phase '{phase}' failed: {error}") from error
        seconds = time.perf_counter() - start
        name = phase.action.value
        report.seconds[name] = report.seconds.get(name, 0.0) + seconds
        report.reshard = resharded or report.reshard

    def _sleep(self, phase: Phase) -> None:
        self._rollout.sleep(phase.sleep_level)

    def _wake_up(self, phase: Phase) -> None:
        self._platform.empty_cache()
        self._rollout.wake_up(list(phase.tags))
