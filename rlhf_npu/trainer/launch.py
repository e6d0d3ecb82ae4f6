"""From a checked configuration to a finished run: data, devices, Ray, workers, the loop, the results."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from transformers import PreTrainedTokenizerBase

from rlhf_npu.config import BatchMath, PPOConfig
from rlhf_npu.data.builtin import resolve
from rlhf_npu.data.loader import PromptLoader
from rlhf_npu.data.prompts import PromptDataset, PromptSample, load_prompts
from rlhf_npu.engines.model_fit import check_fit, check_prompt_ids
from rlhf_npu.engines.model_folder import check_model
from rlhf_npu.errors import DeviceError
from rlhf_npu.platform import PLATFORMS, Platform, detect_platform
from rlhf_npu.trainer.driver_log import logged_traceback
from rlhf_npu.trainer.function_check import FunctionCheck
from rlhf_npu.trainer.learning_curve import draw_learning_curve
from rlhf_npu.trainer.output import OutputFolder
from rlhf_npu.trainer.ppo import PPOTrainer
from rlhf_npu.trainer.rehearsal import rehearse_end
from rlhf_npu.trainer.start_checks import check_data_and_reward
from rlhf_npu.trainer.terminal import Terminal
from rlhf_npu.trainer.trackers import Trackers
from rlhf_npu.workers.worker_group import WorkerGroup

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def train_ppo(config: PPOConfig) -> None:
    """Check all that can be checked, then train; nothing is written before every check has passed.

    Raises:
        RlhfNpuError: what is wrong with the configuration, the data, the model, the devices or the reward.
        SystemExit: with code 130 after Ctrl-C, when every worker has stopped.
    """
    platform = detect_platform(config.trainer.device)
    check_devices(config, platform)
    local = with_local_paths(config)
    policy, tokenizer = check_fit(local)
    prompts, held_out = load_data(local, tokenizer)
    check_prompt_ids((prompts, held_out), tokenizer, policy.vocabulary)
    loader = PromptLoader(prompts, config.data.train_batch_size, config.data.shuffle, config.data.seed)
    total_steps = config.trainer.total_training_steps or config.trainer.total_epochs * len(loader)
    warnings = rehearse_end(local, policy, tokenizer, total_steps)

    terminal = Terminal(total_steps)
    terminal.console.print(BatchMath.from_config(config).table())
    terminal.console.print(f"{describe(prompts, 'training')}; {describe(held_out, 'held-out')}")
    terminal.warn(*warnings)
    check_data_and_reward(local, [prompts, held_out], terminal)
    output = OutputFolder(config.trainer.default_local_dir)
    output.create(config)
    with logged_traceback(output.path / "logs" / "driver.log"), interruptible(terminal, output):
        run(local, platform, loader, list(held_out), total_steps, terminal, output)


def run(
    config: PPOConfig,
    platform: Platform,
    loader: PromptLoader,
    held_out: list[PromptSample],
    total_steps: int,
    terminal: Terminal,
    output: OutputFolder,
) -> None:
    """Start Ray and the workers, fit, and show the results."""
    start = time.perf_counter()
    math = BatchMath.from_config(config)
    run_id = f"rlhf_npu_{uuid.uuid4().hex[:8]}"
    with (
        ray_session(config),
        WorkerGroup(config, platform, run_id, output.path) as workers,
        Trackers(config, output, terminal) as trackers,
    ):
        with terminal.working(f"starting {workers.world_size} workers; their logs are in {output.path / 'logs'}"):
            actor_steps = max(0, total_steps - config.trainer.critic_warmup)
            workers.start((actor_steps * math.actor_optimizer_steps, total_steps * math.critic_optimizer_steps))
        check = FunctionCheck(
            workers,
            next(loader.batches(epoch=0)),
            stops=config.trainer.on_engine_mismatch == "error",
            say=terminal.say,
            warn=terminal.warn,
        )
        PPOTrainer(config, workers, loader, held_out, check, trackers, output, total_steps).fit()
    draw_learning_curve(trackers.history, output.learning_curve)
    terminal.summary(trackers.history, str(output.path), time.perf_counter() - start)


def with_local_paths(config: PPOConfig) -> PPOConfig:
    """The configuration with the local paths that its builtin names stand for.

    Raises:
        ModelError: a model folder is missing or incomplete.
    """
    data = replace(
        config.data,
        train_files=[resolve(path) for path in config.data.train_files],
        val_files=[resolve(path) for path in config.data.val_files],
    )
    policy, critic = config.actor_rollout_ref, config.critic
    policy = replace(policy, model=replace(policy.model, path=local_model(policy.model.path)))
    if critic.model.path is not None and config.has_critic:
        critic = replace(critic, model=replace(critic.model, path=local_model(critic.model.path)))
    reward = replace(config.reward, function=local_function(config.reward.function))
    return replace(config, data=data, actor_rollout_ref=policy, critic=critic, reward=reward)


def local_model(path: str) -> str:
    """The absolute path of a model folder: workers need not share the driver's working folder."""
    return str(check_model(resolve(path)).absolute())


def local_function(function: str) -> str:
    """`path/to/file.py:name` with an absolute path; other names as they are."""
    file, _, name = function.rpartition(":")
    return f"{Path(file).expanduser().absolute()}:{name}" if file.endswith(".py") else function


def load_data(config: PPOConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[PromptDataset, Sequence[PromptSample]]:
    """Training and held-out prompts as token ids."""
    prompts = load_prompts(config.data.train_files, tokenizer, config.data)
    if not config.data.val_files:
        return prompts, ()
    held_out = load_prompts(config.data.val_files, tokenizer, config.data)
    return prompts, held_out[: config.data.val_max_samples or None]


def check_devices(config: PPOConfig, platform: Platform) -> None:
    """Refuse more devices than this machine has, unless Ray runs on a cluster that RAY_ADDRESS names.

    Raises:
        DeviceError: names the key, what was asked for and what is there.
    """
    if "RAY_ADDRESS" in os.environ:
        return
    wanted, present = config.trainer.n_devices_per_node, platform.count()
    if wanted > present:
        unit = "CPU cores" if platform.name == "cpu" else f"{platform.name} devices"
        raise DeviceError(f"trainer.n_devices_per_node={wanted}: this machine has {present} {unit}; set it lower")
    if config.trainer.nnodes > 1:
        raise DeviceError(
            f"trainer.nnodes={config.trainer.nnodes}: several nodes need a Ray cluster; "
            "start one with `ray start` and set RAY_ADDRESS, or submit with `ray job submit`"
        )


def describe(prompts: Sequence[PromptSample], kind: str) -> str:
    """How many prompts there are, and how many were skipped or truncated for their length."""
    counts = [f"{len(prompts)} {kind} prompts"]
    if isinstance(prompts, PromptDataset):
        counts += [f"{prompts.skipped} skipped" for _ in range(prompts.skipped > 0)]
        counts += [f"{prompts.truncated} truncated" for _ in range(prompts.truncated > 0)]
    return ", ".join(counts)


@contextmanager
def ray_session(config: PPOConfig) -> Iterator[None]:
    """A Ray cluster for this run: the one RAY_ADDRESS names, or one of its own on this machine."""
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if "RAY_ADDRESS" in os.environ:
        ray.init(**quiet)
    else:
        ray.init(
            num_cpus=max(PLATFORMS["cpu"].count(), config.trainer.n_devices_per_node),
            include_dashboard=False,
            **quiet,
        )
    stop_once_on_signals()  # ray.init sets a handler of its own
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def interruptible(terminal: Terminal, output: OutputFolder) -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into an orderly end; what was written so far stays whole."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    stop_once_on_signals()
    try:
        yield
    except KeyboardInterrupt:
        terminal.console.print(f"interrupted; all workers have stopped; results so far are in {output.path}")
        raise SystemExit(130) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_once_on_signals() -> None:
    """Raise KeyboardInterrupt on the first Ctrl-C or SIGTERM; further ones would cut the clean-up short."""

    def stop(*_: object) -> None:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in STOP_SIGNALS:
        signal.signal(number, stop)
