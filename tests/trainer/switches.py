"""Steps of two ranks whose switches were measured, for tests of what is made of them."""

from __future__ import annotations

from rlhf_npu.hybrid.ledger import Ledger
from rlhf_npu.hybrid.resharding.reshard import ReshardReport
from rlhf_npu.hybrid.switch_plan import Stage
from rlhf_npu.hybrid.switch_report import PhaseTime, StagePeak, SwitchReport
from rlhf_npu.trainer.switch_times import StepSwitches

GIB = 1 << 30
BESIDE = 2 * GIB  # in use, and no tag's
BACKUP = 3 * GIB  # of actor.params while they sleep
START = 1_700_000_000.0

GENERATING = {"weights": 4 * GIB, "kv_cache": 20 * GIB, "actor.params": 0}
SCORING = {"weights": 0, "kv_cache": 0, "actor.params": 8 * GIB}


def ledger(mapped: dict[str, int], *, other: int = BESIDE) -> Ledger:
    host = {tag: BACKUP if tag == "actor.params" and not size else 0 for tag, size in mapped.items()}
    return Ledger(mapped, host, used=sum(mapped.values()) + other, capacity=40 * GIB, resident=GIB)


def measured_step(name: str = "step 1", began: float = START, before: StepSwitches | None = None) -> StepSwitches:
    """Ten seconds: 6 generating, a switch of 1, 2 of log-probs, and a switch back of 1 with a reshard.

    The second rank is a tenth of a second slower to sleep, and has 1 GiB more beside the tags.
    """
    step = StepSwitches(name, began, before.entries[-1] if before else None)
    step.add([generating(rank, began) for rank in range(2)])
    step.add([scoring(rank, began) for rank in range(2)])
    step.add([generating_again(rank, began) for rank in range(2)])
    step.ended = began + 10.0
    return step


def generating(rank: int, began: float) -> SwitchReport:
    return SwitchReport(Stage.GENERATE, (), ledger(GENERATING, other=BESIDE + rank * GIB), None, began)


def scoring(rank: int, began: float) -> SwitchReport:
    slower = rank / 10
    phases = (
        PhaseTime("sleep", ("weights", "kv_cache"), began + 6.0, 0.5 + slower),
        PhaseTime("wake_up", ("actor.params",), began + 6.5 + slower, 0.4),
    )
    after = ledger(SCORING, other=BESIDE + rank * GIB)
    return SwitchReport(
        Stage.LOG_PROB, phases, after, None, began + 7.0, left=StagePeak(Stage.GENERATE, (29 + rank) * GIB)
    )


def generating_again(rank: int, began: float) -> SwitchReport:
    phases = (
        PhaseTime("wake_up", ("weights",), began + 9.0, 0.1),
        PhaseTime("reshard", (), began + 9.1, 0.3),
        PhaseTime("sleep", ("actor.params",), began + 9.4, 0.2),
        PhaseTime("wake_up", ("kv_cache",), began + 9.6, 0.2),
    )
    reshard = ReshardReport(version=7, moved_bytes=4 * 10**9, buckets=2)
    left = StagePeak(Stage.LOG_PROB, (34 + rank) * GIB)
    after = ledger(GENERATING, other=BESIDE + rank * GIB)
    return SwitchReport(Stage.GENERATE, phases, after, reshard, began + 9.9, left)
