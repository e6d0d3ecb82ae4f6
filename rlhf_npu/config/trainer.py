"""The loop: devices, length, validation, output."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from rlhf_npu.config.keys import AT_LEAST_ONE, NOT_NEGATIVE, SEED, ConfigNode, key

# The last part of the output folder's default.
CLOCK = re.compile(r"\d\d-\d\d-\d\d")


@dataclass
class TrainerConfig(ConfigNode):
    """The run as a whole."""

    device: str = key("auto = NPU, else CUDA, else CPU", "auto", choices=("auto", "cpu", "cuda", "npu"))
    nnodes: int = key("machines", 1, within=AT_LEAST_ONE)
    n_devices_per_node: int = key("devices (on the CPU: processes) a machine", within=AT_LEAST_ONE)
    total_epochs: int = key("passes over the training data", within=AT_LEAST_ONE)
    total_training_steps: int | None = key("steps; null = from total_epochs", within=AT_LEAST_ONE)
    val_before_train: bool = key("validate before the first step", True)
    test_freq: int = key("steps between validations; 0 = only after the last", within=NOT_NEGATIVE)
    save_freq: int = key("steps between checkpoints; 0 = only after the last", 0, within=NOT_NEGATIVE)
    default_local_dir: str = key("output folder", path=True)
    logger: list[str] = key("where metrics go", choices=("console", "jsonl", "tensorboard", "wandb"))
    project_name: str = key("group of runs, for trackers", "rlhf_npu")
    experiment_name: str = key("this run, for trackers")
    seed: int = key("seed of sampling and of new weights", 1, within=SEED)

    @property
    def world_size(self) -> int:
        """Devices in all."""
        return self.nnodes * self.n_devices_per_node

    @property
    def is_folder_by_clock(self) -> bool:
        """Whether the output folder is named by the time, which runs of one second and the jobs of a sweep share."""
        return CLOCK.fullmatch(Path(self.default_local_dir).name) is not None


@dataclass
class PPOTrainerConfig(TrainerConfig):
    """The loop in which the policy generates what it trains on."""

    critic_warmup: int = key("first steps in which only the critic is trained", 0, within=NOT_NEGATIVE)
    on_engine_mismatch: str = key(
        "when trainer and rollout engine score the same tokens differently", "error", choices=("error", "warn")
    )
