"""Warns where the rollout engine's log-probabilities move away from the trainer's during a run."""

from __future__ import annotations

from collections import deque
from statistics import median

from rlhf_npu.trainer.metrics import Metrics

WATCHED = "rollout_corr/logp_diff_mean"
WINDOW = 20
FEWEST = 2
JUMP = 4.0
FLOOR = 1e-4  # nats a token; differences below it move no ratio


class MismatchWatch:
    """Warns when the mean difference of a token's log-probability jumps above what it was in the steps before.

    Each step's responses are scored by both engines on the same weights, so a jump is a fault: weights that did not
    arrive, a cache of old ones, another kernel. It warns once, and again only after the difference came back.
    """

    def __init__(self) -> None:
        self._before: deque[float] = deque(maxlen=WINDOW)
        self._warned = False

    def observe(self, metrics: Metrics, step: int) -> list[str]:  # noqa: ARG002
        """The warning, after the step in which it jumped; a step without rollouts does not count."""
        if WATCHED not in metrics:
            return []
        now = metrics[WATCHED]
        if len(self._before) < FEWEST or now <= self._bound():
            self._before.append(now)
            self._warned = False
            return []
        if self._warned:
            return []
        self._warned = True
        return [self._warning(now)]

    def _warning(self, now: float) -> str:
        return (
            f"{WATCHED} jumped to {now:.1e} from {median(self._before):.1e}: trainer and rollout engine no longer "
            "compute the same function, and the policy is trained on ratios that are wrong. Look at reshard/version, "
            "rollout_corr/* and the workers' logs; scripts/preflight.py --model tries the model by itself"
        )

    def _bound(self) -> float:
        return FLOOR + JUMP * median(self._before)
