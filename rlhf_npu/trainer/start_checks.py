"""What is tried with data and reward before Ray starts, so that a run of hours does not find it out at its end."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from rlhf_npu.config import PPOConfig, RewardConfig
from rlhf_npu.data.prompt_files import PromptDataset
from rlhf_npu.data.sample import PromptSample
from rlhf_npu.errors import RewardError
from rlhf_npu.rewards import BUILTIN_REWARDS, load_reward, load_sample_check, record_checks, trial
from rlhf_npu.trainer.terminal import Terminal

_TRIED_TASKS = 16


def check_data_and_reward(config: PPOConfig, prompts: Sequence[PromptDataset], terminal: Terminal) -> None:
    """Check that the reward can grade the records.

    A built-in reward reads the ground truths, as many as it can in a bounded time. A function of a user's scores two
    responses to one prompt of each data source, in a process of its own and in a bounded time.

    Args:
        prompts: of each data set.

    Raises:
        DataError: names file and row of what is wrong.
        RewardError: there is no such function, it cannot be called, or it failed.
    """
    if not config.reward.names:
        load_reward(config.reward)  # which refuses keyword arguments that nothing takes
    for name in config.reward.names:
        if name in BUILTIN_REWARDS:
            load_reward(config.reward)
            _check_records(config.reward, name, prompts, terminal)
    if not set(config.reward.names) <= set(BUILTIN_REWARDS):
        _try_function(config.reward, prompts, terminal)


def _check_records(config: RewardConfig, name: str, prompts: Sequence[PromptDataset], terminal: Terminal) -> None:
    check = load_sample_check(name)
    what = f"checking {sum(map(len, prompts)):,} ground truths for {config}"
    with terminal.working(f"{what}, for {record_checks.SECONDS:g} s at most"):
        try:
            done = record_checks.check_records(check, prompts, record_checks.SECONDS)
        except RewardError:
            raise
        except RuntimeError as error:
            raise RewardError(f"{config}: {name}: {error}") from error
    terminal.console.print(str(done))
    if done.checked < done.records:
        terminal.warn(
            "a response to a record that turns out to have no readable ground truth will get 0 and be counted"
        )


def _try_function(config: RewardConfig, prompts: Sequence[PromptDataset], terminal: Terminal) -> None:
    samples = _one_of_each_task(prompts)
    what = f"trying {config} on {len(samples)} of the prompts"
    with terminal.working(f"{what}, for {trial.SECONDS:g} s at most"):
        result = trial.try_reward(config, samples, trial.SECONDS)
    if result.warning:
        terminal.warn(result.warning)
    else:
        each = result.seconds / result.answered
        terminal.console.print(f"the reward function scored {result.answered} responses in {each:.3f} s each")


def _one_of_each_task(prompts: Sequence[PromptDataset]) -> list[PromptSample]:
    """The first prompt of each data source of each data set, as many as are tried."""
    firsts = ((dataset, place) for dataset in prompts for place in dataset.first_of_each_source())
    return [dataset[place] for dataset, place in islice(firsts, _TRIED_TASKS)]
