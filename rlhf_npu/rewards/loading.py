"""Finds reward functions by name."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from rlhf_npu.config import RewardConfig
from rlhf_npu.config.reward import KINDS, is_remote
from rlhf_npu.data.sample import PromptSample
from rlhf_npu.edges import one_line
from rlhf_npu.errors import RewardError
from rlhf_npu.rewards.contract import (
    SENT,
    ContractError,
    Function,
    arguments_taken,
    can_take,
    check_kwargs_are_free,
)
from rlhf_npu.rewards.grading import CheckedFunction, Limits, ModelScores, Reward, RewardFunction
from rlhf_npu.rewards.importing import ImportRefusedError, import_file
from rlhf_npu.rewards.remote import RemoteReward

BUILTIN_REWARDS = {
    "digits": "rlhf_npu.rewards.digits:score",
    "math_verify": "rlhf_npu.rewards.math_verify:score",
    "reasoning_gym": "rlhf_npu.rewards.reasoning_gym:score",
}
SampleCheck = Callable[[PromptSample], None]


MODEL_LABEL = "reward_model"


def load_reward(config: RewardConfig, model_weight: float | None = None) -> RewardFunction:
    """The functions that `config` names, with `config.kwargs` bound, and the reward model's scores.

    Of several functions each gets those of the keyword arguments that it has a parameter for.

    Args:
        model_weight: of the reward model's scores, which come with the responses; None without one.

    Raises:
        RewardError: no such builtin, file, module or function, or it does not take the arguments that there are.
    """
    limits = Limits(config.timeout, config.concurrency, config.failed_score, config.max_failed_ratio)
    found = {name: _find(config, name) for name in config.names}
    kwargs = _kwargs_of_each(config, found)
    columns: list[CheckedFunction | ModelScores]
    columns = [_checked(config, name, function, kwargs[name], limits) for name, function in found.items()]
    names, weights = list(config.names), config.weights or [1.0] * len(columns)
    if model_weight is not None:
        columns, names, weights = [*columns, ModelScores()], [*names, MODEL_LABEL], [*weights, model_weight]
    return Reward(columns, labels(names), weights, limits)


def load_sample_check(name: str) -> SampleCheck:
    """What a built-in reward refuses in a record, as `UngradableError`."""
    key_and_name = f"reward.function={name}"
    module, _ = _parts(key_and_name, name)
    check: SampleCheck = _load_module(key_and_name, module).check_sample
    return check


def labels(names: Sequence[str]) -> list[str]:
    """A short name for each function, by which its scores are logged: the last part of its own, numbered if it is not
    the first such."""
    short = [re.split(r"[:/]", name.rstrip("/"))[-1] for name in names]
    seen = [short[:place].count(label) for place, label in enumerate(short)]
    return [f"{label}_{before + 1}" if before else label for label, before in zip(short, seen, strict=True)]


def _find(config: RewardConfig, name: str) -> Function:
    if is_remote(name):
        return RemoteReward(name, config.timeout, config.retries)
    what = _key_and_name(config, name)
    module, attribute = _parts(what, name)
    function: Any = getattr(_load_module(what, module), attribute, None)
    if not callable(function):
        raise RewardError(f"{what}: {module} has no function {attribute!r}")
    return cast("Function", function)


def _kwargs_of_each(config: RewardConfig, found: Mapping[str, Function]) -> dict[str, dict[str, Any]]:
    if len(found) == 1:
        return dict.fromkeys(found, config.kwargs)
    taken = {name: {} for name in found}  # type: dict[str, dict[str, Any]]
    for name, function in found.items():
        with _contract_errors(_key_and_name(config, name)):
            taken[name] = {key: value for key, value in config.kwargs.items() if can_take(function, key)}
    for key in config.kwargs:
        if not any(key in kwargs for kwargs in taken.values()):
            raise RewardError(f"{config}: reward.kwargs.{key}: none of them has such a parameter")
    return taken


def _checked(
    config: RewardConfig, name: str, function: Function, kwargs: Mapping[str, Any], limits: Limits
) -> CheckedFunction:
    what = _key_and_name(config, name)
    with _contract_errors(what):
        arguments = SENT if isinstance(function, RemoteReward) else arguments_taken(function, kwargs)
        check_kwargs_are_free(kwargs)
    longest = function.longest if isinstance(function, RemoteReward) else config.timeout
    return CheckedFunction(partial(function, **kwargs), what, arguments, limits, longest)


@contextmanager
def _contract_errors(what: str) -> Iterator[None]:
    try:
        yield
    except ContractError as error:
        raise RewardError(f"{what}: {error}") from error


def _key_and_name(config: RewardConfig, name: str) -> str:
    return f"reward.function={name}" if config.function is not None else f"reward.functions: {name}"


def _parts(what: str, name: str) -> tuple[str, str]:
    module, _, attribute = BUILTIN_REWARDS.get(name, name).rpartition(":")
    if not module or not attribute:
        raise RewardError(f"{what}: must be {KINDS}")
    return module, attribute


def _load_module(what: str, module: str) -> ModuleType:
    try:
        return import_file(_file(what, module)) if module.endswith(".py") else importlib.import_module(module)
    except RewardError:
        raise
    except ImportRefusedError as error:
        raise RewardError(f"{what}: {error}") from error
    except (Exception, SystemExit) as error:
        raise RewardError(f"{what}: cannot import {module}: {one_line(error)}") from error


def _file(what: str, module: str) -> Path:
    path = Path(module).expanduser().absolute()
    if not path.is_file():
        raise RewardError(f"{what}: {path} is no file; name an existing one as path/to/file.py:name")
    return path
