"""Finds a reward function by name and makes its failures readable."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import math
import numbers
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from rlhf_npu.config import RewardConfig
from rlhf_npu.data.prompts import PromptSample
from rlhf_npu.errors import RewardError

BUILTIN_REWARDS = {
    "digits": "rlhf_npu.rewards.digits:score",
    "math_verify": "rlhf_npu.rewards.math_verify:score",
    "reasoning_gym": "rlhf_npu.rewards.reasoning_gym:score",
}
_EXCERPT = 200


class RewardFunction(Protocol):
    """Scores a response, which is text without special tokens; `finished` says that it ended by itself."""

    def __call__(self, response: str, finished: bool, sample: PromptSample) -> float: ...


class CheckedReward:
    """A reward function whose every result is a finite float.

    Raises:
        RewardError: it raised, or returned something else; names the function, the sample and the response.
    """

    def __init__(self, function: RewardFunction, name: str) -> None:
        self._function = function
        self._name = name

    def __call__(self, response: str, finished: bool, sample: PromptSample) -> float:
        try:
            reward = self._function(response, finished, sample)
        except Exception as error:
            raise RewardError(f"{self._where(response, sample)} raised {type(error).__name__}: {error}") from error
        if not isinstance(reward, numbers.Real) or not math.isfinite(reward):
            raise RewardError(f"{self._where(response, sample)} returned {reward!r}; it must return a finite number")
        return float(reward)

    def _where(self, response: str, sample: PromptSample) -> str:
        excerpt = response if len(response) <= _EXCERPT else response[:_EXCERPT] + "..."
        return (
            f"reward.function={self._name}: on prompt {sample.index} of data source {sample.data_source!r}, "
            f"response {excerpt!r}, it"
        )


def load_reward(config: RewardConfig) -> RewardFunction:
    """The function that `config.function` names, with `config.kwargs` bound.

    Raises:
        RewardError: no such builtin, file, module or function, or it does not take these keyword arguments.
    """
    name = config.function
    module, _, attribute = BUILTIN_REWARDS.get(name, name).rpartition(":")
    if not module or not attribute:
        raise RewardError(
            f"reward.function={name}: must be {', '.join(BUILTIN_REWARDS)}, path/to/file.py:name or package.module:name"
        )
    function = getattr(_load_module(name, module), attribute, None)
    if not callable(function):
        raise RewardError(f"reward.function={name}: {module} has no function {attribute!r}")
    _check_arguments(function, name, config.kwargs)
    return CheckedReward(partial(function, **config.kwargs), name)


def _load_module(name: str, module: str) -> ModuleType:
    try:
        return _load_file(name, Path(module)) if module.endswith(".py") else importlib.import_module(module)
    except RewardError:
        raise
    except Exception as error:
        raise RewardError(f"reward.function={name}: cannot import {module}: {type(error).__name__}: {error}") from error


def _load_file(name: str, path: Path) -> ModuleType:
    path = path.expanduser().absolute()
    if not path.is_file():
        raise RewardError(f"reward.function={name}: {path} is no file; name an existing one as path/to/file.py:name")
    # The file's own classes must be found again by name when they are pickled.
    module_name = f"rlhf_npu_reward_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


def _check_arguments(function: Any, name: str, kwargs: dict[str, Any]) -> None:
    sample = PromptSample(0, (), "", "", None, {})
    try:
        inspect.signature(function).bind("", True, sample, **kwargs)
    except TypeError as error:
        raise RewardError(
            f"reward.function={name}: cannot be called as (response, finished, sample) "
            f"with reward.kwargs={dict(kwargs)}: {error}"
        ) from error
