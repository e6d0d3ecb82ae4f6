"""What would otherwise be tried for the first time after hours, tried before anything starts."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedTokenizerBase

from rlhf_npu.config import ModelConfig, PPOConfig, RootConfig, TrainerConfig
from rlhf_npu.edges import errors_as
from rlhf_npu.engines.model_fit import Skeleton, quiet
from rlhf_npu.engines.models import save_surroundings
from rlhf_npu.errors import ConfigError, ModelError
from rlhf_npu.trainer.learning_curve import check_learning_curve
from rlhf_npu.trainer.trackers import check_trackers

OUTPUT = "trainer.default_local_dir"
KV_CACHE = "actor_rollout_ref.rollout.kv_cache_memory_gb"
GB = 1e9
GIB = 1 << 30


def rehearse_end(
    config: RootConfig,
    model: ModelConfig,
    key: str,
    skeleton: Skeleton,
    tokenizer: PreTrainedTokenizerBase,
    total_steps: int,
) -> list[str]:
    """Try what the end of a run needs: saving, trackers, the picture, room on the disk. Leaves nothing behind.

    Args:
        model: what is trained and saved.
        key: that names its folder.

    Returns warnings: what lets a run begin, and perhaps not end well.

    Raises:
        ConfigError: the output folder or the home folder cannot be made, there is no room, a tracker or the picture
            cannot be had.
        ModelError: the configuration or the tokenizer of the model cannot be saved.
    """
    parent = check_output_folder(config.trainer.default_local_dir)
    warnings = check_home()
    check_trackers(config.trainer)
    check_learning_curve()
    with quiet():
        _check_saving(f"{key}={model.path}", Path(model.path), skeleton, tokenizer)
    return [*warnings, *_check_room(config.trainer, parent, skeleton.parameters, model.dtype, total_steps)]


def check_output_folder(path: str) -> Path:
    """Check that the output folder can be made, by making another one beside it, which is removed.

    Returns the nearest folder above it that is there.

    Raises:
        ConfigError: says what is in the way.
    """
    wrong = f"{OUTPUT}={path}: cannot be made"
    with errors_as(ConfigError, wrong):
        folder = Path(path).expanduser().absolute()
        there = _nearest(folder)
        if not there.is_dir():
            raise ConfigError(f"{wrong}: {there} is no folder")
        longest, limit = max(len(os.fsencode(part)) for part in folder.parts), os.pathconf(there, "PC_NAME_MAX")
        if longest > limit or len(os.fsencode(folder)) > os.pathconf(there, "PC_PATH_MAX") - 2 * limit // 3:
            raise ConfigError(f"{wrong}: the name is too long; a name may have {limit} bytes")
        _try_writing(there)
    return there


def check_home() -> list[str]:
    """Check that the home folder can be written: Ray, torch and vLLM keep there what they make.

    Returns a warning where it is there and cannot be written, since what they need may be in it.

    Raises:
        ConfigError: there is none, and none can be made.
    """
    with errors_as(ConfigError, "HOME"):
        home = Path.home()
    try:
        with errors_as(ConfigError, f"HOME={home}: Ray, torch and vLLM keep files there, and it cannot be written"):
            _try_writing(_nearest(home))
    except ConfigError as error:
        if home.is_dir():
            return [str(error)]
        raise
    return []


def _nearest(folder: Path) -> Path:
    """What is there of a path: itself, or the nearest above it."""
    return next(above for above in (folder, *folder.parents) if os.path.lexists(above))


def _try_writing(folder: Path) -> None:
    """Only a trial tells: permissions do not bind root, and a file system may be mounted read-only."""
    with tempfile.TemporaryDirectory(prefix=".rlhf_npu_", dir=folder):
        pass


def _check_saving(what: str, source: Path, skeleton: Skeleton, tokenizer: PreTrainedTokenizerBase) -> None:
    with (
        errors_as(ModelError, f"{what}: what surrounds the weights could not be saved"),
        tempfile.TemporaryDirectory(prefix="rlhf_npu_") as folder,
    ):
        save_surroundings(skeleton.module.config, tokenizer, source, Path(folder))


def check_host_memory(config: PPOConfig) -> None:
    """Check that the rollout's KV cache fits on this machine, where it is the device.

    Raises:
        ConfigError: it does not.
    """
    wanted, total = config.actor_rollout_ref.rollout.kv_cache_memory_gb, psutil.virtual_memory().total / GIB
    if config.trainer.device == "cpu" and wanted > total:
        raise ConfigError(f"{KV_CACHE}={wanted:g}: this machine has {total:.0f} GiB of memory; set it lower")


def _check_room(trainer: TrainerConfig, folder: Path, parameters: int, dtype_name: str, total_steps: int) -> list[str]:
    dtype: torch.dtype = getattr(torch, dtype_name)
    model, free = parameters * dtype.itemsize / GB, shutil.disk_usage(folder).free / GB
    if model > free:
        raise ConfigError(
            f"{OUTPUT}={trainer.default_local_dir}: the model takes {model:.1f} GB, and {free:.1f} GB are free "
            "there; make room, or name a folder on another disk"
        )
    every = trainer.save_freq
    models = 1 + ((total_steps - 1) // every if every else 0)
    if models * model <= free:
        return []
    saved = f"{models} models of {model:.1f} GB will be saved (trainer.save_freq={every})"
    return [f"{saved}, and {free:.1f} GB are free in {folder}"]
