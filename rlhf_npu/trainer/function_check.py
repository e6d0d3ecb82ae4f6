"""Before a run trains on what was generated: that trainer and rollout engine compute the same function."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from rlhf_npu.data.prompts import PromptSample
from rlhf_npu.errors import EngineMismatchError
from rlhf_npu.hybrid.same_function import FunctionReport
from rlhf_npu.hybrid.switch_plan import Stage
from rlhf_npu.workers.worker_group import WorkerGroup

PROMPTS = 4
PROMPT_TOKENS = 256
PrintLine = Callable[[str], None]


class FunctionCheck:
    """Lets all ranks score the same few prompts with both engines.

    Args:
        workers: awake, with the rollout's weights in place.
        prompts: those to choose from.
        stops: whether a difference ends the run; otherwise it is a warning.
        say, warn: how to print one line.
    """

    def __init__(
        self, workers: WorkerGroup, prompts: Sequence[PromptSample], stops: bool, say: PrintLine, warn: PrintLine
    ) -> None:
        self._workers = workers
        self._prompts = few_prompts(prompts)
        self._stops = stops
        self._say = say
        self._warn = warn

    def before_training(self) -> None:
        """Send the rollout engine its first weights, those that the trainer has read, and compare the engines.

        Raises:
            EngineMismatchError: they compute different functions.
            ReshardError: the weights cannot be resharded.
        """
        self._workers.call("rehearse_reshard")
        self._compare("before training", trained=False)

    def after_training(self, step: int) -> None:
        """Compare the engines after the reshard of trained weights.

        Raises:
            EngineMismatchError: they compute different functions.
        """
        self._compare(f"after the reshard of step {step}")

    def _compare(self, when: str, trained: bool = True) -> None:
        start = time.perf_counter()
        self._workers.call("enter", Stage.GENERATE)
        self._workers.call("rollout_scores", self._prompts)
        self._workers.call("enter", Stage.LOG_PROB)
        reports: list[FunctionReport] = self._workers.call("compare_functions")
        seconds = time.perf_counter() - start
        worst = max(reports, key=lambda report: (not report.same, report.worst.mean))
        if worst.same:
            self._say(
                f"trainer and rollout engine compute the same function {when}: {_agreement(worst)} ({seconds:.2f} s)"
            )
        elif self._stops:
            raise EngineMismatchError(self._complaint(worst, when, trained))
        else:
            self._warn(self._complaint(worst, when, trained))

    def _complaint(self, report: FunctionReport, when: str, trained: bool) -> str:
        return (
            f"trainer and rollout engine compute different functions {when}. {report.worst}. The trainer's attention "
            f"is {report.trainer_attention}, the rollout engine's {report.rollout_attention}. "
            f"{self._cause(report, trained)} With trainer.on_engine_mismatch=warn the run goes on regardless."
        )

    def _cause(self, report: FunctionReport, trained: bool) -> str:
        reading, generating, training = (comparison.same for comparison in report.comparisons)
        if reading and generating and not training:
            return "The likely cause is noise in training mode, such as dropout, which the model's code adds by itself."
        if trained:
            return "The likely cause is that weights did not come where they belong when they were resharded."
        if reading:
            return (
                "The likely cause is the rollout engine's cache, or how it samples: it reads the same tokens rightly."
            )
        if report.trainer_attention != "eager" and all(self._workers.call("agrees_with_eager_attention")):
            return "With eager attention they agree: set actor_rollout_ref.model.attn_implementation=eager."
        return (
            "The likely cause is a model that one of the two libraries computes differently, or whose weights did not "
            "come where they belong in the rollout engine: `python scripts/preflight.py --model PATH`, where the "
            "rollout engine first reads the folder itself, tells which."
        )


def few_prompts(prompts: Sequence[PromptSample]) -> list[tuple[int, ...]]:
    """The token ids of up to four prompts from the shortest to the longest; of a long one its end."""
    by_length = sorted((prompt.prompt_ids for prompt in prompts), key=len)
    last = len(by_length) - 1
    places = sorted({last * part // (PROMPTS - 1) for part in range(PROMPTS)})
    return [by_length[place][-PROMPT_TOKENS:] for place in places]


def _agreement(report: FunctionReport) -> str:
    reading = report.comparisons[0]
    return (
        f"log-probabilities of {reading.tokens} tokens differ by {reading.mean:.0e} on average, of which rounding "
        f"explains {reading.mean_explained:.0e}"
    )
