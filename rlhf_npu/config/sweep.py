"""Sweeps (`--multirun`): all jobs are checked before the first one runs."""

from __future__ import annotations

from collections import Counter
from typing import Any

from hydra import compose
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf_npu.config.compose import checked
from rlhf_npu.config.trainer import TrainerConfig
from rlhf_npu.errors import ConfigError

BASIC_SWEEPER = f"{BasicSweeper.__module__}.{BasicSweeper.__qualname__}"


class RefusedSweep(BaseException):
    """Carries an error past Hydra, which turns what a callback raises into a warning."""

    def __init__(self, error: ConfigError) -> None:
        super().__init__(error)
        self.error = error


class CheckJobs(Callback):
    """What Hydra calls when a sweep starts; another sweeper than Hydra's own decides on its jobs as it goes."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Raises RefusedSweep: a job's configuration cannot work, or two jobs would write to one folder."""
        if config.hydra.sweeper._target_ != BASIC_SWEEPER:
            return
        overrides: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
        jobs = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(overrides), max_batch_size=None)
        try:
            _check_folders([_trainer(config.hydra.job.config_name, job) for job in jobs[0]])
        except ConfigError as error:
            raise RefusedSweep(error) from error
        except (HydraException, OmegaConfBaseException):
            return  # Hydra composes the jobs next, and raises it where it is explained


def _trainer(config_name: str, overrides: list[str]) -> TrainerConfig:
    try:
        return checked(compose(config_name, overrides=overrides)).trainer
    except ConfigError as error:
        raise ConfigError(f"the job {' '.join(overrides)}: {error}") from error


def _check_folders(jobs: list[TrainerConfig]) -> None:
    folders = Counter(job.default_local_dir for job in jobs if not job.is_folder_by_clock)
    shared = [folder for folder, count in folders.items() if count > 1]
    if shared:
        raise ConfigError(
            f"trainer.default_local_dir={shared[0]}: {folders[shared[0]]} jobs of the sweep would write there; name it "
            "after what differs, for example runs/seed_${trainer.seed}, or leave it out"
        )
