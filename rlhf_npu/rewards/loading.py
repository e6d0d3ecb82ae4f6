"""Finds a reward function by name and makes its failures readable."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Protocol

from rlhf_npu.config import RewardConfig
from rlhf_npu.data.sample import PromptSample
from rlhf_npu.edges import one_line, words_of
from rlhf_npu.errors import RewardError
from rlhf_npu.rewards.contract import (
    ContractError,
    Function,
    Graded,
    UngradableError,
    arguments_taken,
    as_graded,
    offered,
    shown,
)
from rlhf_npu.rewards.importing import ImportRefusedError, import_file

BUILTIN_REWARDS = {
    "digits": "rlhf_npu.rewards.digits:score",
    "math_verify": "rlhf_npu.rewards.math_verify:score",
    "reasoning_gym": "rlhf_npu.rewards.reasoning_gym:score",
}
SampleCheck = Callable[[PromptSample], None]


class RewardFunction(Protocol):
    """Scores a response, which is text without special tokens; `finished` says that it ended by itself."""

    def __call__(self, response: str, finished: bool, sample: PromptSample) -> float: ...

    def grade(self, response: str, finished: bool, sample: PromptSample) -> Graded:
        """The score, with what else the function returned."""


class CheckedReward:
    """A reward function that gets the arguments it names, and whose every result is a finite float.

    Raises:
        RewardError: it raised, even `SystemExit`, or returned something else; names the function, the sample and the
            response.
    """

    def __init__(self, function: Function, name: str, arguments: tuple[str, ...]) -> None:
        self._function = function
        self._name = name
        self._arguments = arguments

    def __call__(self, response: str, finished: bool, sample: PromptSample) -> float:
        return self.grade(response, finished, sample).score

    def grade(self, response: str, finished: bool, sample: PromptSample) -> Graded:
        """The score, with what else the function returned; 0 where it says that the record cannot be graded."""
        available = offered(response, finished, sample)
        try:
            return as_graded(self._function(**{name: available[name] for name in self._arguments}))
        except UngradableError as error:
            return Graded(0.0, ungradable=words_of(error) or one_line(error))
        except ContractError as error:
            raise RewardError(f"{self._where(response, sample)} {error}") from error
        except BaseException as error:  # Ctrl-C does not reach a worker: KeyboardInterrupt is the function's as well
            raise RewardError(f"{self._where(response, sample)} raised {one_line(error)}") from error

    def _where(self, response: str, sample: PromptSample) -> str:
        place = f" ({sample.location})" if sample.file else ""
        return (
            f"reward.function={self._name}: on prompt {sample.index} of data source {sample.data_source!r}{place}, "
            f"response {shown(response)}, it"
        )


def load_reward(config: RewardConfig) -> RewardFunction:
    """The function that `config.function` names, with `config.kwargs` bound.

    Raises:
        RewardError: no such builtin, file, module or function, or it does not take the arguments that there are.
    """
    name = config.function
    module, attribute = _parts(name)
    function = getattr(_load_module(name, module), attribute, None)
    if not callable(function):
        raise RewardError(f"reward.function={name}: {module} has no function {attribute!r}")
    try:
        arguments = arguments_taken(function, config.kwargs)
    except ContractError as error:
        raise RewardError(f"reward.function={name}: {error}") from error
    return CheckedReward(partial(function, **config.kwargs), name, arguments)


def load_sample_check(config: RewardConfig) -> SampleCheck:
    """What a built-in reward refuses in a record, as `UngradableError`."""
    module, _ = _parts(config.function)
    check: SampleCheck = _load_module(config.function, module).check_sample
    return check


def _parts(name: str) -> tuple[str, str]:
    module, _, attribute = BUILTIN_REWARDS.get(name, name).rpartition(":")
    if not module or not attribute:
        raise RewardError(
            f"reward.function={name}: must be {', '.join(BUILTIN_REWARDS)}, path/to/file.py:name or package.module:name"
        )
    return module, attribute


def _load_module(name: str, module: str) -> ModuleType:
    try:
        return import_file(_file(name, module)) if module.endswith(".py") else importlib.import_module(module)
    except RewardError:
        raise
    except ImportRefusedError as error:
        raise RewardError(f"reward.function={name}: {error}") from error
    except (Exception, SystemExit) as error:
        raise RewardError(f"reward.function={name}: cannot import {module}: {one_line(error)}") from error


def _file(name: str, module: str) -> Path:
    path = Path(module).expanduser().absolute()
    if not path.is_file():
        raise RewardError(f"reward.function={name}: {path} is no file; name an existing one as path/to/file.py:name")
    return path
