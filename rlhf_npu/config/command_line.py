"""The command line of an entry point: Hydra underneath, readable messages on top."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.text import Text

from rlhf_npu.config import help_page
from rlhf_npu.config.compose import HYDRA_VERSION_BASE, checked, config_folder
from rlhf_npu.config.explain import explain
from rlhf_npu.config.ppo import PPOConfig
from rlhf_npu.config.sweep import RefusedSweep
from rlhf_npu.errors import RlhfNpuError

BAD_INPUT = 2
FULL_ERROR = "HYDRA_FULL_ERROR"


def run_from_command_line(config_name: str, job: Callable[[PPOConfig], None]) -> None:
    """Composes the configuration from `sys.argv`, checks it, and calls `job` with it.

    Hydra's flags work (`--help`, `--cfg job`, `--info`, `--config-dir`, `--multirun`). An `RlhfNpuError`
    ends the process with status 2 and a message on stderr; with `HYDRA_FULL_ERROR=1` in the environment
    it is raised as it is.
    """
    full_error = os.environ.get(FULL_ERROR)

    def task(composed: DictConfig) -> None:
        _set_environment(FULL_ERROR, full_error)
        try:
            job(checked(composed))
        except RlhfNpuError as error:
            _exit_with(error, full_error == "1")

    help_page.register()
    overrides, folders = _read_arguments()
    _set_environment(FULL_ERROR, "1")  # so that Hydra raises what it would print in its own words
    try:
        with _folder_of_sweep():
            hydra.main(str(config_folder()), config_name, HYDRA_VERSION_BASE)(task)()
    except RefusedSweep as refused:
        _exit_with(refused.error, full_error == "1")
    except (HydraException, OmegaConfBaseException) as error:
        _exit_with(explain(error, overrides, folders), full_error == "1")
    finally:
        _set_environment(FULL_ERROR, full_error)


@contextmanager
def _folder_of_sweep() -> Iterator[None]:
    """A folder for what Hydra writes about a sweep, unless the user names one: each job has its folder, as any run."""
    chosen = any(word.lstrip("+").startswith("hydra.sweep.dir=") for word in sys.argv)
    if chosen or not get_args_parser().parse_args().multirun:
        yield
        return
    with TemporaryDirectory(prefix="rlhf_npu_sweep_") as folder:
        sys.argv.append(f"hydra.sweep.dir={folder}")
        yield


def _read_arguments() -> tuple[list[str], list[Path]]:
    """The overrides, and the folders in which Hydra looks for YAML files and groups.

    Puts `sys.argv` in the order that Hydra can parse: flags, then overrides. A recipe's overrides come
    before what the user adds, which may be flags.
    """
    arguments = get_args_parser().parse_intermixed_args()
    overrides = list(arguments.overrides)
    flags = [word for word in sys.argv[1:] if word not in overrides]
    primary = config_folder()
    if arguments.config_path and not arguments.config_path.startswith("pkg://"):
        # Hydra takes a relative path from the folder of the calling file; a user means the current one.
        primary = Path(arguments.config_path).absolute()
        flags += ["--config-path", str(primary)]
    sys.argv[1:] = [*flags, *overrides]
    extra = [Path(arguments.config_dir).absolute()] if arguments.config_dir else []
    return overrides, [primary, *extra]


def _set_environment(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _exit_with(error: RlhfNpuError, raise_it: bool) -> NoReturn:
    if raise_it:
        raise error
    Console(stderr=True).print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
    sys.exit(BAD_INPUT)
