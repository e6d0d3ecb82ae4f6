"""From a checked configuration to a finished run that learns from files: SFT, preferences or a reward model."""

from __future__ import annotations

import time
from dataclasses import replace

from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from rlhf_npu.config import DPOConfig, OfflineConfig, RewardModelConfig
from rlhf_npu.config.preference_loss import REFERENCE_FREE
from rlhf_npu.data.builtin import resolve
from rlhf_npu.data.examples import ExampleDataset, Kind, collect_examples
from rlhf_npu.data.problems import DataProblems
from rlhf_npu.engines.model_fit import MODEL, Skeleton, check_alone
from rlhf_npu.errors import DataError
from rlhf_npu.interrupts import raise_if_interrupted
from rlhf_npu.platform import Platform, detect_platform
from rlhf_npu.run_id import new_run_id
from rlhf_npu.trainer.interruption import interruptible_run, run_folder
from rlhf_npu.trainer.launch import check_devices, local_model
from rlhf_npu.trainer.learning_curve import draw_learning_curve
from rlhf_npu.trainer.offline import OfflineTrainer, steps_of
from rlhf_npu.trainer.output import OutputFolder
from rlhf_npu.trainer.ray_session import check_cluster, ray_session
from rlhf_npu.trainer.reference_cache import reference_of
from rlhf_npu.trainer.rehearsal import rehearse_end
from rlhf_npu.trainer.terminal import Terminal
from rlhf_npu.trainer.trackers import Trackers
from rlhf_npu.workers.offline_worker import OfflineWorker
from rlhf_npu.workers.worker_group import WorkerGroup

LINE = (
    ("loss", "train/loss", "{:.4f}"),
    ("accuracy", "rewards/accuracies", "{:.3f}"),
    ("margin", "rewards/margins", "{:+.3f}"),
    ("grad", "train/grad_norm", "{:.2f}"),
    ("step", "timing_s/step", "{:.2f}s"),
    ("tok/s", "perf/throughput", "{:.0f}"),
)


def train_offline(config: OfflineConfig) -> None:
    """Check all that can be checked, then train; nothing is written before every check has passed.

    Raises:
        RlhfNpuError: what is wrong with the configuration, the data, the model or the devices.
        SystemExit: with code 130 after Ctrl-C, when every worker has stopped.
    """
    with interruptible_run():
        _train(config)


def _train(config: OfflineConfig) -> None:
    platform = detect_platform(config.trainer.device)
    check_cluster()
    check_devices(config, platform)
    local = _with_local_paths(config)
    kind = AutoModelForSequenceClassification if isinstance(config, RewardModelConfig) else AutoModelForCausalLM
    model, tokenizer = check_alone(local.model, local.data.max_length, kind)
    data = _load_data(local, model, tokenizer)
    total_steps = steps_of(local, len(data["train"]))
    warnings = rehearse_end(local, local.model, MODEL, model, tokenizer, total_steps)

    terminal = Terminal(total_steps, LINE)
    for name, examples in data.items():
        terminal.console.print(_describe(examples, name))
    terminal.warn(*config.warnings(), *warnings)
    raise_if_interrupted()
    with run_folder(config, terminal) as output:
        run(local, platform, data, total_steps, terminal, output)


def run(
    config: OfflineConfig,
    platform: Platform,
    data: dict[str, ExampleDataset],
    total_steps: int,
    terminal: Terminal,
    output: OutputFolder,
) -> None:
    """Start Ray and the workers, fit, and show the results."""
    start = time.perf_counter()
    with (
        ray_session(config),
        WorkerGroup(OfflineWorker, config, platform, new_run_id(), output.path) as workers,
        Trackers(config, output, terminal) as trackers,
    ):
        with terminal.working(f"starting {workers.world_size} workers; their logs are in {output.path / 'logs'}"):
            workers.start(total_steps, data)
        reference = {}
        if isinstance(config, DPOConfig) and config.loss.loss_type not in REFERENCE_FREE:
            reference = reference_of(config, platform.name, workers, data, terminal)
        output.keep()
        OfflineTrainer(config, workers, data, reference, trackers, output, total_steps).fit()
    draw_learning_curve(trackers.history, output.learning_curve)
    terminal.summary(trackers.history, str(output.path), time.perf_counter() - start)


def _with_local_paths(config: OfflineConfig) -> OfflineConfig:
    data = replace(
        config.data,
        train_files=[resolve(path) for path in config.data.train_files],
        val_files=[resolve(path) for path in config.data.val_files],
    )
    return replace(config, data=data, model=replace(config.model, path=local_model(config.model.path)))


def _kind(config: OfflineConfig) -> Kind:
    if isinstance(config, DPOConfig):
        return "unpaired" if config.loss.loss_type == "kto" else "pairs"
    return "pairs" if isinstance(config, RewardModelConfig) else "sft"


def _load_data(config: OfflineConfig, model: Skeleton, tokenizer: PreTrainedTokenizerBase) -> dict[str, ExampleDataset]:
    """Training examples as `train`, held-out ones, where there are any, as `val`."""
    problems, files = DataProblems(), {"train": config.data.train_files, "val": config.data.val_files}
    data = {
        name: collect_examples(_kind(config), names, tokenizer, config.data, problems)
        for name, names in files.items()
        if names
    }
    problems.check()
    if "val" in data and config.data.val_max_samples:
        data["val"] = data["val"].first(config.data.val_max_samples)
    for name, examples in data.items():
        if examples.largest_token >= model.vocabulary:
            token = tokenizer.convert_ids_to_tokens(examples.largest_token)
            raise DataError(
                f"data.{name}_files: an example holds the token {token!r}, whose id {examples.largest_token} the model "
                f"has no embedding for: it has {model.vocabulary}; use the tokenizer that the model was trained with"
            )
    batch, count = config.data.train_batch_size, len(data["train"])
    if batch > count:
        raise DataError(
            f"data.train_batch_size={batch}: the training files have {count} examples "
            f"({data['train'].skipped} skipped for their length); set it to at most that"
        )
    return data


def _describe(examples: ExampleDataset, name: str) -> str:
    counts = [f"{len(examples):,} {name} examples, {int(examples.tokens.sum()):,} tokens"]
    counts += [f"{examples.skipped} skipped" for _ in range(examples.skipped > 0)]
    counts += [f"{examples.truncated} truncated" for _ in range(examples.truncated > 0)]
    return ", ".join(counts)
