"""The hybrid engine: the sharding manager that lets trainers and rollout take turns on one device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from allocator import SleepPool
from rlhf_npu.engines.rollout import RolloutEngine
from rlhf_npu.errors import ReshardError, SwitchError
from rlhf_npu.hybrid.calibration import Calibration
from rlhf_npu.hybrid.ledger import PeakMeter, read_ledger
from rlhf_npu.hybrid.resharding.reshard import Resharder, ReshardReport
from rlhf_npu.hybrid.switch_plan import Action, Fate, Phase, Stage, SwitchPlan
from rlhf_npu.hybrid.switch_report import PhaseTime, StagePeak, SwitchReport
from rlhf_npu.hybrid.tags import ROLLOUT_TAGS
from rlhf_npu.platform import Platform


class Trainer(Protocol):
    """A model under DeepSpeed whose states are in tags of the pool."""

    def release_gathered(self) -> None:
        """Partition again what a pass has gathered: it is in no tag."""


class HybridEngine:
    """Enters stages: puts to sleep and wakes what the plan says, reshards where the rollout's weights are behind.

    A phase that fails raises SwitchError; entering the same stage, or another one, does what is left to do: a reshard
    is done anew.

    Args:
        rollout: awake or asleep, as are the trainers.
        resharder: from the actor into the rollout.
        trainers: by role, the first part of their tags' names.
        plan: who is awake in which stage; another one holds from the next stage on.
        calibration: while there is one, it sees what each stage takes beside the tags.
    """

    def __init__(
        self,
        rollout: RolloutEngine,
        resharder: Resharder,
        trainers: Mapping[str, Trainer],
        plan: SwitchPlan,
        platform: Platform,
        calibration: Calibration | None = None,
    ) -> None:
        self._rollout = rollout
        self._resharder = resharder
        self._trainers = trainers
        self._platform = platform
        self._pool = SleepPool.get(platform.device())
        self._peak = PeakMeter(platform)
        self._actions: dict[Action, Callable[[Phase], None]] = {
            Action.SLEEP: self._sleep,
            Action.WAKE_UP: self._wake_up,
        }
        self._awake: set[str] = set()
        self._asleep: set[str] = set()
        self._rollout_is_behind = True
        self._version = 0  # of the actor's weights
        self.plan = plan
        self.calibration = calibration
        self.stage: Stage | None = None

    def enter(self, stage: Stage) -> SwitchReport:
        """Make the device ready for the work of `stage`, from whatever stage it is in.

        Raises:
            SwitchError: a phase failed; names it, its tags and the stage.
            ReshardError: the rollout does not hold the trainer's weights after a reshard.
        """
        phases: list[PhaseTime] = []
        resharded = None
        left = self._peak_of_stage()
        if self.calibration is not None:
            self.calibration.leave(left, self._awake_bytes())
        if stage is Stage.GENERATE:  # the longest stage, which needs none of what torch has cached while training
            self._platform.empty_cache()
        if stage is Stage.RESHARD or (stage is Stage.GENERATE and self._rollout_is_behind):
            self._move_to(Stage.RESHARD, phases)
            resharded = self._reshard(phases)
        self._move_to(stage, phases)
        if stage is Stage.TRAIN_ACTOR:
            self._rollout_is_behind = True
            self._version += 1
        after = read_ledger(self._platform)
        self._peak.start(after.used)
        return SwitchReport(stage, tuple(phases), after, resharded, time.time(), left)

    def rehearse_reshard(self) -> None:
        """Reshard the weights that the run begins with, and prove that each of the rollout's came.

        Raises:
            ReshardError: vLLM does not take all of them while it runs.
            SwitchError: a phase failed.
        """
        self._move_to(Stage.RESHARD, [])
        with self._resharding():
            self._resharder.rehearse()
            self._rollout.reset_prefix_cache()

    def require(self, stage: Stage) -> None:
        """Refuse work that belongs to another stage than the one that was entered.

        Raises:
            SwitchError: names both.
        """
        if self.stage is not stage:
            now = "no stage" if self.stage is None else f"stage '{self.stage.value}'"
            raise SwitchError(f"this is work of stage '{stage.value}', and the device is in {now}: enter it first")

    def _peak_of_stage(self) -> StagePeak | None:
        """Of the stage that ends now; none of one that was entered without success."""
        peak = self._peak.stop()
        return None if self.stage is None or peak is None else StagePeak(self.stage, peak)

    def _awake_bytes(self) -> int:
        return sum(tag.bytes for tag in self.plan.tags if tag.name in self._awake)

    def _move_to(self, stage: Stage, times: list[PhaseTime]) -> None:
        self.stage = None  # should a phase fail, no work is allowed
        for phase in self.plan.phases(stage, self._awake, self._asleep):
            self._execute(phase, stage, times)
        self.stage = stage

    def _execute(self, phase: Phase, stage: Stage, times: list[PhaseTime]) -> None:
        self._awake -= set(phase.tags)
        self._asleep -= set(phase.tags)
        with _named(phase, stage), _timed(phase.action, phase.tags, times):
            self._actions[phase.action](phase)
            self._platform.synchronize()
        (self._asleep if phase.action is Action.SLEEP else self._awake).update(phase.tags)

    def _reshard(self, times: list[PhaseTime]) -> ReshardReport:
        with self._resharding(), _timed(Action.RESHARD, (), times):
            report = self._resharder.reshard(self._version)
            # What was computed of earlier prompts came from other weights.
            self._rollout.reset_prefix_cache()
            self._platform.synchronize()
        return report

    @contextmanager
    def _resharding(self) -> Iterator[None]:
        """The rollout is behind until all within it is done."""
        self._rollout_is_behind, self.stage = True, None
        tags = tuple(tag.name for tag in self.plan.tags if Stage.RESHARD in tag.needed)
        with _named(Phase(Action.RESHARD, tags), Stage.RESHARD):
            yield
        self._rollout_is_behind, self.stage = False, Stage.RESHARD

    def _sleep(self, phase: Phase) -> None:
        fates = {tag.name: tag.fate for tag in self.plan.tags}
        if any(tag in ROLLOUT_TAGS for tag in phase.tags):
            keeps_weights = fates["weights"] is Fate.OFFLOAD
            self._rollout_is_behind |= not keeps_weights
            self._rollout.sleep(level=1 if keeps_weights else 2)
        trainers = [tag for tag in phase.tags if tag not in ROLLOUT_TAGS]
        for role in dict.fromkeys(tag.partition(".")[0] for tag in trainers):
            self._trainers[role].release_gathered()
        offload = [tag for tag in trainers if fates[tag] is Fate.OFFLOAD]
        discard = [tag for tag in trainers if fates[tag] is Fate.DISCARD]
        self._pool.sleep(offload=offload, discard=discard)

    def _wake_up(self, phase: Phase) -> None:
        sizes = {tag.name: tag.bytes for tag in self.plan.tags}
        if self._pool.memory_info().free < sum(sizes[tag] for tag in phase.tags):
            self._platform.empty_cache()
        rollout = [tag for tag in phase.tags if tag in ROLLOUT_TAGS]
        trainers = [tag for tag in phase.tags if tag not in ROLLOUT_TAGS]
        if trainers:
            self._pool.wake_up(trainers)
        for tag in rollout:  # vLLM does nothing at all for tags of which one is awake
            self._rollout.wake_up([tag])


@contextmanager
def _named(phase: Phase, stage: Stage) -> Iterator[None]:
    """What fails within it is said with the phase, its tags and the stage; a ReshardError says what it must itself."""
    try:
        yield
    except ReshardError:
        raise
    except Exception as error:
        raise SwitchError(f"entering stage '{stage.value}': phase '{phase}' failed: {error}") from error


@contextmanager
def _timed(action: Action, tags: tuple[str, ...], times: list[PhaseTime]) -> Iterator[None]:
    """Add the time of what is done within it to `times`, unless it fails."""
    start = time.time()
    yield
    times.append(PhaseTime(action.value, tags, start, time.time() - start))
