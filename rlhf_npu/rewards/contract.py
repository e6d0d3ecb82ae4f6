"""What a reward function may take, return and raise."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from rlhf_npu.data.sample import PromptSample
from rlhf_npu.edges import repr_of

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
# What functions that score whole batches take in TRL, OpenRLHF and verl's batch reward manager.
_BATCHES = {
    *("prompts", "completions", "completion_ids", "trainer_state"),
    *("queries", "labels", "responses", "answers"),
    *("data_sources", "solution_strs", "ground_truths", "extra_infos"),
}


class UngradableError(ValueError):
    """A reward function raises this for a record to which no response can be graded, saying why.

    The response gets 0, and the run goes on and says so.
    """


class ContractError(ValueError):
    """A function cannot be called as a reward function, or what it returned is no reward."""


@dataclass(frozen=True)
class Graded:
    """A reward, what else the function returned beside it, and why the record cannot be graded if it cannot."""

    score: float
    extra_info: dict[str, Any] = field(default_factory=dict)
    ungradable: str | None = None


def offered(response: str, finished: bool, sample: PromptSample) -> dict[str, Any]:
    """All arguments that a reward function may take, by name."""
    return {
        "response": response,
        "finished": finished,
        "sample": sample,
        "prompt": sample.prompt_text,
        "solution_str": response,
        "data_source": sample.data_source,
        "ground_truth": sample.ground_truth,
        "extra_info": sample.extra_info,
    }


OFFERED = tuple(offered("", True, PromptSample(0, (), "", "", None, {})))


def arguments_taken(function: Function, kwargs: Mapping[Any, Any]) -> tuple[str, ...]:
    """Which of `OFFERED` the function takes by name, given that `kwargs` are bound.

    Raises:
        ContractError: it cannot be called with them; says which parameter is in the way.
    """
    _check_kind(function)
    parameters = _parameters(function)
    by_name = {name for name, parameter in parameters.items() if parameter.kind in _BY_NAME}
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    _check_kwargs(kwargs, by_name, takes_any)
    for name, parameter in parameters.items():
        if name not in kwargs:
            _check_parameter(name, parameter)
    fixed = function.keywords if isinstance(function, functools.partial) else {}
    taken = tuple(name for name in OFFERED if (takes_any or name in by_name) and name not in fixed)
    if not taken:
        raise ContractError(f"it takes none of the arguments that it could score by; {_names()}")
    return taken


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


def shown(value: Any) -> str:
    """An excerpt of what a function got or returned."""
    text = repr_of(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def _check_kind(function: Function) -> None:
    if inspect.isclass(function):
        raise ContractError("it is a class; make an object of it, whose __call__ scores, and name that")
    inner: Any = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    for scoring in (inner, type(inner).__call__):
        if inspect.iscoroutinefunction(scoring):
            raise ContractError(
                "it is an async function, and responses are scored one after the other; "
                "make it an ordinary one that calls asyncio.run"
            )
        if inspect.isgeneratorfunction(scoring) or inspect.isasyncgenfunction(scoring):
            raise ContractError("it is a generator function: it yields where it must return a number")


def _parameters(function: Function) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise ContractError(
            f"the names of its parameters cannot be read ({error}); wrap it in a function of your own; {_names()}"
        ) from error


def _check_kwargs(kwargs: Mapping[Any, Any], by_name: set[str], takes_any: bool) -> None:
    for key in kwargs:
        if key in OFFERED:
            raise ContractError(f"reward.kwargs.{key}: the run passes {key!r} itself; take the key away")
        if not isinstance(key, str) or not (takes_any or key in by_name):
            raise ContractError(
                f"reward.kwargs.{key}: it has no such parameter; it has {', '.join(sorted(by_name)) or 'none'}"
            )


def _check_parameter(name: str, parameter: inspect.Parameter) -> None:
    """Refuse a parameter that nobody would set, and one that would silently keep its default."""
    required = parameter.default is inspect.Parameter.empty
    if parameter.kind is inspect.Parameter.VAR_POSITIONAL or parameter.kind is inspect.Parameter.VAR_KEYWORD:
        return
    if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
        if required or name in OFFERED:
            raise ContractError(f"its parameter {name!r} takes no name, and arguments are passed by name; {_names()}")
        return
    if name in _BATCHES:
        raise ContractError(
            f"its parameter {name!r} is that of a function that scores whole batches (TRL, OpenRLHF); "
            f"here one call scores one response; {_names()}"
        )
    if name in _ELSEWHERE:
        raise ContractError(
            f"its parameter {name!r} is not among what it could get; here it is {_ELSEWHERE[name]}; {_names()}"
        )
    if required and name not in OFFERED:
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
