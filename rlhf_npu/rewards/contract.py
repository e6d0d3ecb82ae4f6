"""What a reward function may take, return and raise."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from rlhf_npu.data.sample import PromptSample
from rlhf_npu.edges import printable, repr_of

Function = Callable[..., Any]
_LARGEST = 3.4028234663852886e38  # of float32, in which rewards reach the trainer
_SHOWN = 200

# Names that elsewhere stand for what is offered here under another one.
_ELSEWHERE = {
    "completion": "response",
    "generated_text": "response",
    "model_output": "response",
    "output": "response",
    "predict": "response",
    "predict_str": "response",
    "prediction": "response",
    "response_str": "response",
    "solution": "response or ground_truth",
    "answer": "ground_truth",
    "gold": "ground_truth",
    "label": "ground_truth",
    "reference": "ground_truth",
    "target": "ground_truth",
    "question": "prompt",
    "query": "prompt",
}
# What functions that score whole batches take in verl's batch reward manager, and here,
OFFERED_BATCHES = ("data_sources", "solution_strs", "ground_truths", "extra_infos")
# and what they take in TRL and OpenRLHF.
_OTHER_BATCHES = {
    *("prompts", "completions", "completion_ids", "trainer_state"),
    *("queries", "labels", "responses", "answers"),
}


class UngradableError(ValueError):
    """A reward function raises this for a record to which no response can be graded, saying why.

    The response gets 0, and the run goes on and says so.
    """


class ContractError(ValueError):
    """A function cannot be called as a reward function, or what it returned is no reward."""


@dataclass(frozen=True)
class Graded:
    """A reward and what else the function returned beside it.

    Attributes:
        ungradable: why the record cannot be graded, if it cannot.
        failure: why there is no score but `reward.failed_score`, if so.
    """

    score: float
    extra_info: dict[str, Any] = field(default_factory=dict)
    ungradable: str | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Response:
    """What is scored: text without special tokens; `finished` says that it ended by itself.

    Attributes:
        by_model: what the run's reward model says of it, if there is one.
    """

    text: str
    finished: bool
    sample: PromptSample
    by_model: Graded | None = None


def offered(response: Response) -> dict[str, Any]:
    """All arguments that a function that scores one response may take, by name."""
    sample = response.sample
    return {
        "response": response.text,
        "finished": response.finished,
        "sample": sample,
        "prompt": sample.prompt_text,
        "solution_str": response.text,
        "data_source": sample.data_source,
        "ground_truth": sample.ground_truth,
        "extra_info": sample.extra_info,
    }


def offered_batch(responses: Sequence[Response]) -> dict[str, list[Any]]:
    """All arguments that a function that scores all responses at once may take, by name; as verl has them."""
    return {
        "data_sources": [response.sample.data_source for response in responses],
        "solution_strs": [response.text for response in responses],
        "ground_truths": [response.sample.ground_truth for response in responses],
        "extra_infos": [response.sample.extra_info for response in responses],
    }


SENT = ("data_source", "solution_str", "ground_truth", "extra_info")
"""What a service gets of `OFFERED`: the arguments of verl's reward functions."""
OFFERED = tuple(offered(Response("", True, PromptSample(0, (), "", "", None, {}))))


def arguments_taken(function: Function, kwargs: Mapping[Any, Any]) -> tuple[str, ...]:
    """Which of `OFFERED`, or of `OFFERED_BATCHES`, the function takes by name, given that `kwargs` are bound.

    Raises:
        ContractError: it cannot be called with them; says which parameter is in the way.
    """
    _check_kind(function)
    parameters = _parameters(function)
    by_name = {name for name, parameter in parameters.items() if parameter.kind in _BY_NAME}
    takes_any = _takes_any(parameters)
    there = OFFERED_BATCHES if by_name & {*OFFERED_BATCHES} else OFFERED
    check_kwargs_are_free(kwargs)
    _check_kwargs(kwargs, by_name, takes_any)
    for name, parameter in parameters.items():
        if name not in kwargs:
            _check_parameter(name, parameter, there)
    fixed = function.keywords if isinstance(function, functools.partial) else {}
    taken = tuple(name for name in there if (takes_any or name in by_name) and name not in fixed)
    if not taken:
        raise ContractError(f"it takes none of the arguments that it could score by; {_names()}")
    return taken


def can_take(function: Function, name: Any) -> bool:
    """Whether it has a parameter of that name, or takes any."""
    parameters = _parameters(function)
    return _takes_any(parameters) or (name in parameters and parameters[name].kind in _BY_NAME)


def check_kwargs_are_free(kwargs: Mapping[Any, Any]) -> None:
    """Refuse keyword arguments that the run passes itself.

    Raises:
        ContractError: names the first.
    """
    for key in kwargs:
        if key in OFFERED or key in OFFERED_BATCHES:
            raise ContractError(f"reward.kwargs.{key}: the run passes {key!r} itself; take the key away")


def is_async(function: Function) -> bool:
    """Whether calling it gives something to wait for."""
    return any(map(inspect.iscoroutinefunction, _bodies(function)))


def _takes_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())


_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def as_graded(value: Any) -> Graded:
    """The reward in what a function returned: a finite number, or a dict with one under `score`.

    Numbers are those of Python, numpy, `decimal` and `fractions`, booleans, and arrays and tensors without dimensions.

    Raises:
        ContractError: it is something else.
    """
    if isinstance(value, Mapping):
        if "score" not in value:
            raise ContractError(f"returned {shown(value)}; it must return a finite number, or a dict with a 'score'")
        extra = {str(key): item for key, item in value.items() if key != "score"}
        return Graded(_as_float(value["score"], value), extra)
    return Graded(_as_float(value, value))


def as_batch(value: Any, count: int) -> list[Any]:
    """The items of what a function returned for `count` responses: a list, a tuple, or an array of one dimension.

    Raises:
        ContractError: it is something else, or has another length.
    """
    shape = getattr(value, "shape", None)
    items = list(value) if isinstance(value, list | tuple) or (shape is not None and len(shape) == 1) else None
    if items is None:
        raise ContractError(f"returned {shown(value)}; it must return a list with an item for each response")
    if len(items) != count:
        raise ContractError(f"returned {len(items)} items for {count} responses: {shown(value)}")
    return items


def numeric_parts(extra_info: Mapping[str, Any]) -> dict[str, float]:
    """What of it is a finite number, as rewards are, by names that can be printed."""
    parts = {}
    for name, value in extra_info.items():
        with suppress(Exception):  # of whatever class the value is
            parts[printable(name)] = _as_float(value, value)
    return parts


def shown(value: Any) -> str:
    """An excerpt of what a function got or returned."""
    text = repr_of(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def _check_kind(function: Function) -> None:
    if inspect.isclass(function):
        raise ContractError("it is a class; make an object of it, whose __call__ scores, and name that")
    if any(inspect.isgeneratorfunction(body) or inspect.isasyncgenfunction(body) for body in _bodies(function)):
        raise ContractError("it is a generator function: it yields where it must return a number")


def _bodies(function: Function) -> tuple[Any, Any]:
    """The function itself inside partial ones, and the method that calling it calls."""
    inner: Any = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    return inner, type(inner).__call__


def _parameters(function: Function) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise ContractError(
            f"the names of its parameters cannot be read ({error}); wrap it in a function of your own; {_names()}"
        ) from error


def _check_kwargs(kwargs: Mapping[Any, Any], by_name: set[str], takes_any: bool) -> None:
    for key in kwargs:
        if not isinstance(key, str) or not (takes_any or key in by_name):
            raise ContractError(
                f"reward.kwargs.{key}: it has no such parameter; it has {', '.join(sorted(by_name)) or 'none'}"
            )


def _check_parameter(name: str, parameter: inspect.Parameter, there: Sequence[str]) -> None:
    """Refuse a parameter that nobody would set, and one that would silently keep its default."""
    required = parameter.default is inspect.Parameter.empty
    if parameter.kind is inspect.Parameter.VAR_POSITIONAL or parameter.kind is inspect.Parameter.VAR_KEYWORD:
        return
    if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
        if required or name in there:
            raise ContractError(f"its parameter {name!r} takes no name, and arguments are passed by name; {_names()}")
        return
    if name in _OTHER_BATCHES:
        raise ContractError(
            f"its parameter {name!r} is that of a function that scores whole batches (TRL, OpenRLHF); "
            f"here such a function takes {', '.join(OFFERED_BATCHES)}; where one response is scored, {_names()}"
        )
    if there is OFFERED_BATCHES and name in OFFERED:
        raise ContractError(
            f"it scores whole batches, as {', '.join(OFFERED_BATCHES)} say, and its parameter {name!r} is of one "
            "response"
        )
    if there is OFFERED and name in _ELSEWHERE:
        raise ContractError(
            f"its parameter {name!r} is not among what it could get; here it is {_ELSEWHERE[name]}; {_names()}"
        )
    if required and name not in there:
        raise ContractError(f"its parameter {name!r} is not among what it could get; {_names()}")


def _names() -> str:
    return f"arguments are passed by name, and there are {', '.join(OFFERED)}; others come from reward.kwargs"


def _as_float(value: Any, whole: Any) -> float:
    number = value
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        number = value.item()
    if not isinstance(number, numbers.Real | Decimal):
        raise ContractError(f"returned {shown(whole)}; it must return a finite number{_hint(value)}")
    try:
        result = float(number)
    except (OverflowError, ValueError):  # an integer that is too large, a signaling NaN
        result = math.nan
    if not abs(result) <= _LARGEST:
        raise ContractError(f"returned {shown(whole)}; it must return a finite number of at most {_LARGEST:.1e}")
    return result


def _hint(value: Any) -> str:
    if inspect.isawaitable(value) or inspect.isgenerator(value):
        return ", not something to wait for or to go through"
    if hasattr(value, "shape"):
        return f", and this has the shape {shown(value.shape)}"
    if isinstance(value, tuple | list):
        return ", or a dict with a 'score' if there is more to tell"
    return ""
