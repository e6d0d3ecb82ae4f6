"""Puts references, written in torch operators on NPU tensors, in the place of the NPU's own operators.

A reference takes the arguments that it honours and no others. What else the operator's schema has must be at its
default, or the call is refused: nothing is ignored unless the reference lists it as without influence on the result.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])

ALL_OTHERS = ("*",)
CALLS: Counter[str] = Counter()
_references: dict[str, tuple[Callable[..., Any], frozenset[str]]] = {}
_libraries: dict[str, torch.library.Library] = {}


class NotSimulatedError(NotImplementedError):
    """What was asked of an operator is not simulated; the message names the operator, and the argument if it is one."""


def reference(name: str, *, no_influence: Iterable[str] = ()) -> Callable[[_Function], _Function]:
    """Registers the function for the operator `name`, such as "npu::npu_swiglu" or "npu::npu_swiglu.out".

    The function's positional parameters stand for the first ones of the operator's schema, in order, and its
    keyword-only parameters for those of the same name. `no_influence` are arguments that may have any value, since
    they steer how the hardware computes and not what; ALL_OTHERS stands for all that the function does not take.
    """

    def register(function: _Function) -> _Function:
        _references[name] = (function, frozenset(no_influence))
        return function

    return register


def implementation(name: str, function: Callable[..., Any], no_influence: frozenset[str]) -> Callable[..., Any]:
    """What the dispatcher calls: binds the arguments by the schema, and refuses what `function` does not take."""
    schema = _schema(name)
    defaults = {argument.name: argument.default_value for argument in schema.arguments}
    parameters = inspect.signature(function).parameters.values()
    positional = list(defaults)[: sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)]
    keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    if no_influence == frozenset(ALL_OTHERS):
        no_influence = frozenset(defaults)
    if unknown := {*keywords, *no_influence} - defaults.keys():
        raise TypeError(f"{name} has no {', '.join(sorted(unknown))}: {schema}")

    def call(*arguments: Any, **named: Any) -> Any:
        given = defaults | dict(zip(defaults, arguments, strict=False)) | named
        for key in given.keys() - {*positional, *keywords} - no_influence:
            if not _same(given[key], defaults[key]):
                raise NotSimulatedError(f"{name}: {key} is not simulated, and was given as {_words(given[key])}")
        CALLS[name] += 1
        return function(*(given[key] for key in positional), **{key: given[key] for key in keywords})

    return call


def install(namespaces: Iterable[str], kept: Iterable[str]) -> None:
    """Registers all references, and for the rest of `namespaces`, `kept` aside, one that raises NotSimulatedError."""
    for name, (function, no_influence) in _references.items():
        _register(name, implementation(name, function, no_influence))
    missing = {
        name
        for name in torch._C._dispatch_get_registrations_for_dispatch_key("PrivateUse1")
        if name.partition("::")[0] in namespaces
    }
    for name in missing - _references.keys() - set(kept):
        _register(name, _refusal(name))


def _register(name: str, function: Callable[..., Any]) -> None:
    namespace, _, operator = name.partition("::")
    if namespace not in _libraries:
        _libraries[namespace] = torch.library.Library(namespace, "IMPL")
    _libraries[namespace].impl(operator, function, "PrivateUse1", allow_override=True)


def _refusal(name: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise NotSimulatedError(f"{name} is not simulated: add a reference to tests/aclsim/python/simulated_npu")

    return refuse


def _schema(name: str) -> torch.FunctionSchema:
    namespace, _, operator = name.partition("::")
    base, _, overload = operator.partition(".")
    schema: torch.FunctionSchema = getattr(getattr(getattr(torch.ops, namespace), base), overload or "default")._schema
    return schema


def _same(value: object, default: object) -> bool:
    if isinstance(value, torch.Tensor) or isinstance(default, torch.Tensor):
        return value is default
    return value == default


def _words(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return repr(value)
