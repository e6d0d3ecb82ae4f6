"""From a checked configuration to a finished run: data, devices, Ray, workers, the loop, the results."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rlhf_npu.config import PPOConfig, RootConfig
from rlhf_npu.data.builtin import resolve
from rlhf_npu.data.loader import PromptLoader
from rlhf_npu.data.problems import DataProblems
from rlhf_npu.data.prompt_files import PromptDataset
from rlhf_npu.data.prompts import collect_prompts
from rlhf_npu.engines.model_fit import POLICY, check_fit, check_prompt_ids
from rlhf_npu.engines.model_folder import check_model
from rlhf_npu.engines.reward_model_fit import ScoringFit, check_reward_model
from rlhf_npu.errors import DeviceError
from rlhf_npu.hybrid.memory.memory_plan import MemoryPlan, check_memory
from rlhf_npu.hybrid.switch_plan import SwitchPlan
from rlhf_npu.interrupts import raise_if_interrupted
from rlhf_npu.platform import Platform, detect_platform
from rlhf_npu.run_id import new_run_id
from rlhf_npu.trainer.function_check import FunctionCheck
from rlhf_npu.trainer.interruption import interruptible_run, run_folder
from rlhf_npu.trainer.learning_curve import draw_learning_curve
from rlhf_npu.trainer.memory_picture import draw_memory
from rlhf_npu.trainer.output import OutputFolder
from rlhf_npu.trainer.plan_watch import PlanWatch
from rlhf_npu.trainer.ppo import PPOTrainer
from rlhf_npu.trainer.ray_session import check_cluster, cluster_address, ray_session
from rlhf_npu.trainer.rehearsal import check_host_memory, rehearse_end
from rlhf_npu.trainer.start_checks import check_data_and_reward
from rlhf_npu.trainer.switch_record import SwitchRecord
from rlhf_npu.trainer.terminal import PPO_LINE, Terminal
from rlhf_npu.trainer.trackers import Trackers, watchers_of
from rlhf_npu.workers.hybrid_worker import HybridWorker
from rlhf_npu.workers.worker_group import WorkerGroup


def train_ppo(config: PPOConfig) -> None:
    """Check all that can be checked, then train; nothing is written before every check has passed.

    Raises:
        RlhfNpuError: what is wrong with the configuration, the data, the model, the devices or the reward.
        SystemExit: with code 130 after Ctrl-C, when every worker has stopped.
    """
    with interruptible_run():
        _train(config)


def _train(config: PPOConfig) -> None:
    platform = detect_platform(config.trainer.device)
    check_cluster()
    check_devices(config, platform)
    local = with_local_paths(config)
    policy, tokenizer = check_fit(local)
    scoring = check_reward_model(local, tokenizer) if config.reward_model.enable else None
    prompts, held_out = load_data(local, tokenizer, scoring)
    check_prompt_ids((prompts, held_out), tokenizer, policy.vocabulary)
    loader = PromptLoader(prompts, config.data.train_batch_size, config.data.shuffle, config.data.seed)
    total_steps = config.trainer.total_training_steps or config.trainer.total_epochs * len(loader)
    memory = check_memory(local, policy, platform)
    model = local.actor_rollout_ref.model
    warnings = rehearse_end(local, model, POLICY, policy, tokenizer, total_steps)
    check_host_memory(local)

    terminal = Terminal(total_steps, PPO_LINE)
    terminal.console.print(config.batch_math.table())
    terminal.console.print(f"{describe(prompts, 'training')}; {describe(held_out, 'held-out')}")
    terminal.console.print(str(memory), soft_wrap=True)
    if scoring is not None:
        terminal.console.print(f"{scoring}; its score counts {config.reward_model.weight:g} times in the reward")
    terminal.warn(*config.warnings(), *warnings)
    check_data_and_reward(local, [prompts, held_out], terminal)
    raise_if_interrupted()
    with run_folder(config, terminal) as output:
        run(local, platform, memory, loader, held_out, total_steps, terminal, output)


def run(
    config: PPOConfig,
    platform: Platform,
    memory: MemoryPlan,
    loader: PromptLoader,
    held_out: PromptDataset,
    total_steps: int,
    terminal: Terminal,
    output: OutputFolder,
) -> None:
    """Start Ray and the workers, fit, and show the results."""
    start = time.perf_counter()
    math = config.batch_math
    with (
        ray_session(config),
        WorkerGroup(HybridWorker, config, platform, new_run_id(), output.path, math.tensor_parallel) as workers,
        Trackers(config, output, terminal, watchers_of(config, output)) as trackers,
        SwitchRecord(output.trace, terminal) as switches,
    ):
        with terminal.working(f"starting {workers.world_size} workers; their logs are in {output.path / 'logs'}"):
            actor_steps = max(0, total_steps - config.trainer.critic_warmup)
            optimizer_steps = actor_steps * math.actor_optimizer_steps, total_steps * math.critic_optimizer_steps
            plan: SwitchPlan = workers.start(optimizer_steps, memory)[0]
        terminal.say(str(plan))
        plans = PlanWatch(config, memory.device, plan, say=terminal.say, warn=terminal.warn)
        check = FunctionCheck(
            workers,
            next(loader.batches(epoch=0)),
            stops=config.trainer.on_engine_mismatch == "error",
            say=terminal.say,
            warn=terminal.warn,
        )
        check.before_training()
        output.keep()
        PPOTrainer(config, workers, plans, loader, held_out, check, trackers, switches, output, total_steps).fit()
    draw_learning_curve(trackers.history, output.learning_curve)
    if switches.last_step is not None:
        draw_memory(switches.last_step, output.memory_picture)
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
    function, functions = config.reward.function, config.reward.functions
    reward = replace(
        config.reward,
        function=None if function is None else local_function(function),
        functions=[local_function(name) for name in functions],
    )
    scoring = config.reward_model
    if scoring.model.path is not None:
        scoring = replace(scoring, model=replace(scoring.model, path=local_model(scoring.model.path)))
    return replace(config, data=data, actor_rollout_ref=policy, critic=critic, reward=reward, reward_model=scoring)


def local_model(path: str) -> str:
    """The absolute path of a model folder: workers need not share the driver's working folder."""
    return str(check_model(resolve(path)).absolute())


def local_function(function: str) -> str:
    """`path/to/file.py:name` with an absolute path; other names as they are."""
    file, _, name = function.rpartition(":")
    return f"{Path(file).expanduser().absolute()}:{name}" if file.endswith(".py") else function


def load_data(
    config: PPOConfig, tokenizer: PreTrainedTokenizerBase, scoring: ScoringFit | None = None
) -> tuple[PromptDataset, PromptDataset]:
    """Training and held-out prompts as token ids.

    Args:
        scoring: the reward model that will read them.

    Raises:
        DataError: what is wrong with both.
        ModelError: the reward model cannot read chats.
    """
    problems = DataProblems()
    rewrites = scoring is not None and not scoring.conversations.as_they_are
    prompts, held_out = (
        collect_prompts(files, tokenizer, config.data, problems, keeps_messages=rewrites)
        for files in (config.data.train_files, config.data.val_files)
    )
    problems.check()
    if scoring is not None and rewrites:
        scoring.check_prompts((prompts, held_out))
    most = config.data.val_max_samples
    return prompts, held_out.first(most) if most else held_out


def check_devices(config: RootConfig, platform: Platform) -> None:
    """Refuse more devices than this machine has, unless Ray runs on a cluster that RAY_ADDRESS names.

    Raises:
        DeviceError: names the key, what was asked for and what is there.
    """
    if cluster_address():
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


def describe(prompts: PromptDataset, kind: str) -> str:
    """How many prompts there are, and how many were skipped or truncated for their length."""
    counts = [f"{len(prompts)} {kind} prompts"]
    counts += [f"{prompts.skipped} skipped" for _ in range(prompts.skipped > 0)]
    counts += [f"{prompts.truncated} truncated" for _ in range(prompts.truncated > 0)]
    return ", ".join(counts)
