"""Calls reward functions, checks what they return, and makes their failures readable."""

from __future__ import annotations

import asyncio
import math
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from rlhf_npu.data.sample import PromptSample
from rlhf_npu.edges import one_line, words_of
from rlhf_npu.errors import RewardError
from rlhf_npu.rewards.contract import (
    OFFERED_BATCHES,
    ContractError,
    Function,
    Graded,
    Response,
    UngradableError,
    as_batch,
    as_graded,
    is_async,
    offered,
    offered_batch,
    shown,
)
from rlhf_npu.rewards.time_limit import TimeKeeper, TimeUp

_SECONDS_TO_CANCEL = 5.0


class RewardFunction(Protocol):
    """Scores responses, which are text without special tokens; `finished` says that one ended by itself."""

    @property
    def scores_batches(self) -> bool:
        """Whether a function of it scores all responses at once."""

    def __call__(self, response: str, finished: bool, sample: PromptSample) -> float: ...

    def grade(self, response: str, finished: bool, sample: PromptSample) -> Graded:
        """The score, with what else the function returned."""

    def grade_all(self, responses: Sequence[Response], may_fail: int = 0) -> list[Graded]:
        """The same of each; `may_fail` of them may get `reward.failed_score` and a reason instead.

        Raises:
            RewardError: more failed: a function raised, even `SystemExit`, took too long, or returned something else;
                names the function, the sample and the response.
        """


@dataclass(frozen=True)
class Limits:
    """Attributes are keys of `reward`."""

    timeout: float | None
    concurrency: int
    failed_score: float
    max_failed_ratio: float


class Failures:
    """Counts the responses that could not be scored, and raises at one too many."""

    def __init__(self, allowed: int, limits: Limits) -> None:
        self._allowed = allowed
        self._limits = limits
        self._places: set[int] = set()

    def settle(self, place: int, outcome: Graded | RewardError) -> Graded:
        """The outcome of the response at `place`; with `reward.failed_score` if it is a failure that is allowed.

        Raises:
            RewardError: it is not.
        """
        if isinstance(outcome, Graded):
            return outcome
        self._places.add(place)
        if self._allowed == 0:
            raise outcome
        if len(self._places) > self._allowed:
            raise RewardError(
                f"reward.max_failed_ratio={self._limits.max_failed_ratio:g} allows {self._allowed} responses of a step "
                f"to fail, and {len(self._places)} have; the last: {outcome}"
            ) from outcome
        traceback.print_exception(outcome)
        return Graded(self._limits.failed_score, failure=str(outcome))


class CheckedFunction:
    """A function that gets the arguments it names, and whose every result is a finite float or a failure.

    Args:
        name: key and name, as messages have it.
        arguments: those of `OFFERED`, or of `OFFERED_BATCHES`, that it takes.
        longest: seconds that a call may take; None = no limit.
    """

    def __init__(
        self, function: Function, name: str, arguments: tuple[str, ...], limits: Limits, longest: float | None
    ) -> None:
        self._function = function
        self._name = name
        self._arguments = arguments
        self._limits = limits
        self._longest = longest
        self.scores_batches = set(arguments) <= {*OFFERED_BATCHES}

    def grade(self, responses: Sequence[Response], failures: Failures) -> list[Graded]:
        """The outcome of each response.

        Raises:
            RewardError: more failed than `failures` allows.
        """
        if not responses:
            return []
        if self.scores_batches:
            return self._grade_at_once(responses, failures)
        if is_async(self._function):
            return self._grade_concurrently(responses, failures)
        with TimeKeeper() as keeper:
            return [failures.settle(place, self._outcome(keeper, item)) for place, item in enumerate(responses)]

    def _outcome(self, keeper: TimeKeeper, response: Response) -> Graded | RewardError:
        available = offered(response)
        try:
            with keeper.call(self._longest):
                value = self._function(**{name: available[name] for name in self._arguments})
            return as_graded(value)
        except BaseException as error:  # noqa: BLE001  # Ctrl-C does not reach a worker: it is the function's as well
            return self._reason(TimeUp() if keeper.is_over else error, response)

    def _grade_at_once(self, responses: Sequence[Response], failures: Failures) -> list[Graded]:
        available = offered_batch(responses)
        arguments = {name: available[name] for name in self._arguments}
        outcomes: list[Graded | RewardError]
        with TimeKeeper() as keeper:
            try:
                with keeper.call(self._longest):
                    value = self._function(**arguments)
                    value = _run(value) if is_async(self._function) else value
                items = as_batch(value, len(responses))
                outcomes = [self._item_outcome(*pair) for pair in zip(items, responses, strict=True)]
            except BaseException as error:  # noqa: BLE001
                reason = TimeUp() if keeper.is_over else error
                if keeper.is_over:
                    _leave_loop(keeper)
                outcomes = [self._failure(reason, item) for item in responses]
        return [failures.settle(place, outcome) for place, outcome in enumerate(outcomes)]

    def _item_outcome(self, item: Any, response: Response) -> Graded | RewardError:
        try:
            return as_graded(item)
        except Exception as error:  # noqa: BLE001
            return self._failure(error, response)

    def _grade_concurrently(self, responses: Sequence[Response], failures: Failures) -> list[Graded]:
        """Each call has a limit of its own; that of all together is for one that blocks the others."""
        turns = math.ceil(len(responses) / self._limits.concurrency) + 1
        graded: dict[int, Graded] = {}
        with TimeKeeper() as keeper:
            try:
                with keeper.call(None if self._longest is None else self._longest * turns):
                    _run(self._settle_all(responses, failures, graded))
            except TimeUp as error:
                _leave_loop(keeper)
                for place in set(range(len(responses))) - set(graded):
                    graded[place] = failures.settle(place, self._failure(error, responses[place]))
        return [graded[place] for place in range(len(responses))]

    async def _settle_all(self, responses: Sequence[Response], failures: Failures, graded: dict[int, Graded]) -> None:
        slots = asyncio.Semaphore(self._limits.concurrency)

        async def settle(place: int, response: Response) -> None:
            async with slots:
                outcome = await self._awaited(response)
            graded[place] = failures.settle(place, outcome)

        tasks = [asyncio.ensure_future(settle(place, item)) for place, item in enumerate(responses)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _awaited(self, response: Response) -> Graded | RewardError:
        available = offered(response)
        limit = asyncio.timeout(self._longest)
        try:
            async with limit:
                value = await self._function(**{name: available[name] for name in self._arguments})
            if limit.expired():  # and the function caught what interrupted it
                raise TimeUp
            return as_graded(value)
        except BaseException as error:
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise
            return self._reason(TimeUp() if limit.expired() else error, response)

    def _reason(self, error: BaseException, response: Response) -> Graded | RewardError:
        if isinstance(error, UngradableError):
            return Graded(0.0, ungradable=words_of(error) or one_line(error))
        return self._failure(error, response)

    def _failure(self, error: BaseException, response: Response) -> RewardError:
        sample = response.sample
        place = f" ({sample.location})" if sample.file else ""
        if isinstance(error, ContractError):
            what = str(error)
        elif isinstance(error, TimeUp):
            what = f"took longer than reward.timeout={self._limits.timeout or math.inf:g} s"
        else:
            what = f"raised {one_line(error)}"
        failure = RewardError(
            f"{self._name}: on prompt {sample.index} of data source {sample.data_source!r}{place}, "
            f"response {shown(response.text)}, it {what}"
        )
        failure.__cause__ = error
        return failure


class ModelScores:
    """The scores that the run's reward model has given, in the place of a function."""

    scores_batches = False

    def grade(self, responses: Sequence[Response], failures: Failures) -> list[Graded]:
        """The outcome of each response.

        Raises:
            RewardError: more failed than `failures` allows.
        """
        return [failures.settle(place, self._outcome(response)) for place, response in enumerate(responses)]

    def _outcome(self, response: Response) -> Graded | RewardError:
        assert response.by_model is not None
        graded, sample = response.by_model, response.sample
        failure = graded.failure
        if failure is None and not math.isfinite(graded.score):
            failure = f"the score is {graded.score}"
        if failure is None:
            return graded
        place = f" ({sample.location})" if sample.file else ""
        return RewardError(
            f"reward_model: on prompt {sample.index} of data source {sample.data_source!r}{place}, "
            f"response {shown(response.text)}: {failure}"
        )


class Reward:
    """One function, or the weighted sum of several and of a reward model; a `RewardFunction`.

    In a sum each one's score is a part under its label, and its parts are under `label/part`.
    """

    def __init__(
        self,
        functions: Sequence[CheckedFunction | ModelScores],
        labels: Sequence[str],
        weights: Sequence[float],
        limits: Limits,
    ) -> None:
        self._functions = list(functions)
        self._labels = list(labels)
        self._weights = list(weights)
        self._limits = limits

    @property
    def scores_batches(self) -> bool:
        return any(function.scores_batches for function in self._functions)

    def __call__(self, response: str, finished: bool, sample: PromptSample) -> float:
        return self.grade(response, finished, sample).score

    def grade(self, response: str, finished: bool, sample: PromptSample) -> Graded:
        return self.grade_all([Response(response, finished, sample)])[0]

    def grade_all(self, responses: Sequence[Response], may_fail: int = 0) -> list[Graded]:
        failures = Failures(may_fail, self._limits)
        columns = [function.grade(responses, failures) for function in self._functions]
        if self._is_one_function:
            return columns[0]
        return [self._sum(row, failures, place) for place, row in enumerate(zip(*columns, strict=True))]

    @property
    def _is_one_function(self) -> bool:
        return self._weights == [1.0] and isinstance(self._functions[0], CheckedFunction)

    def _sum(self, row: Sequence[Graded], failures: Failures, place: int) -> Graded:
        parts: dict[str, Any] = {}
        for label, graded in zip(self._labels, row, strict=True):
            parts[label] = graded.score
            parts |= {f"{label}/{name}": value for name, value in graded.extra_info.items()}
        failure = next((graded.failure for graded in row if graded.failure is not None), None)
        ungradable = next((graded.ungradable for graded in row if graded.ungradable is not None), None)
        if failure is not None:
            return Graded(self._limits.failed_score, parts, failure=failure)
        if ungradable is not None:
            return Graded(0.0, parts, ungradable=ungradable)
        try:
            total = math.fsum(weight * graded.score for weight, graded in zip(self._weights, row, strict=True))
            return Graded(as_graded(total).score, parts)
        except (ContractError, OverflowError) as error:
            failure_of_sum = RewardError(f"reward.weights={self._weights}: the weighted sum of {parts} {error}")
            return failures.settle(place, failure_of_sum)


_loops: list[asyncio.Runner] = []  # one, so that what async functions keep between calls stays usable


def _run(coroutine: Any) -> Any:
    if not _loops:
        _loops.append(asyncio.Runner())
    return _loops[0].run(coroutine)


def _leave_loop(keeper: TimeKeeper) -> None:
    """Cancel what an interrupted loop still holds; what does not end is left behind."""
    with suppress(TimeUp), keeper.call(_SECONDS_TO_CANCEL):
        while _loops:
            _loops.pop().close()
