"""The command line of an entry point: Hydra underneath, readable messages on top."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig
from rich.console import Console
from rich.text import Text

from rlhf_npu.config import help_page
from rlhf_npu.config.compose import HYDRA_VERSION_BASE, checked, config_folder
from rlhf_npu.config.explain import explain
from rlhf_npu.config.overrides import as_hydra_takes_them
from rlhf_npu.config.root import RootConfig
from rlhf_npu.config.schema import Schema
from rlhf_npu.config.streams import use_lasting_streams
from rlhf_npu.config.sweep import RefusedSweep
from rlhf_npu.edges import one_line, printable
from rlhf_npu.errors import RlhfNpuError

BUG, BAD_INPUT = 1, 2
FULL_ERROR = "HYDRA_FULL_ERROR"


def run_from_command_line(schema: Schema, job: Callable[[Any], None]) -> None:
    """Composes the configuration of `schema` from `sys.argv`, checks it, and calls `job` with it.

    Hydra's flags work (`--help`, `--cfg job`, `--info`, `--config-dir`, `--multirun`). An `RlhfNpuError`
    ends the process with status 2 and a message on stderr; any other error of `job` is a fault of this program and
    ends it with status 1 and one line. With `HYDRA_FULL_ERROR=1` in the environment both are raised as they are.
    """
    full_error = os.environ.get(FULL_ERROR)

    def task(composed: DictConfig) -> None:
        _set_environment(FULL_ERROR, full_error)
        with _one_line_errors(full_error == "1"):
            config = _checked(composed, overrides, folders, schema)
            try:
                job(config)
            except RlhfNpuError:
                raise
            except Exception as error:
                if full_error == "1":
                    raise
                _exit_with_bug(error)

    use_lasting_streams()
    help_page.register(schema)
    with _one_line_errors(full_error == "1"):
        overrides, folders = _read_arguments(schema)
        _set_environment(FULL_ERROR, "1")  # so that Hydra raises what it would print in its own words
        try:
            with _folder_of_sweep():
                hydra.main(str(config_folder()), schema.name, HYDRA_VERSION_BASE)(task)()
        except RlhfNpuError:
            raise
        except RefusedSweep as refused:
            raise refused.error from None
        except Exception as error:
            if full_error == "1":
                raise
            raise explain(error, overrides, folders, schema) from None
        finally:
            _set_environment(FULL_ERROR, full_error)


def _checked(composed: DictConfig, overrides: list[str], folders: list[Path], schema: Schema) -> RootConfig:
    try:
        return checked(composed)
    except RlhfNpuError:
        raise
    except Exception as error:  # noqa: BLE001  # what resolving an interpolation raises
        raise explain(error, overrides, folders, schema) from None


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


def _read_arguments(schema: Schema) -> tuple[list[str], list[Path]]:
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
    sys.argv[1:] = [*flags, *as_hydra_takes_them(overrides, schema)]
    extra = [Path(arguments.config_dir).absolute()] if arguments.config_dir else []
    return overrides, [primary, *extra]


def _set_environment(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


@contextmanager
def _one_line_errors(raise_them: bool) -> Iterator[None]:
    try:
        yield
    except RlhfNpuError as error:
        if raise_them:
            raise
        _print_error("error", str(error), _where_the_traceback_is(error) if error.__cause__ else "")
        sys.exit(BAD_INPUT)


def _exit_with_bug(error: Exception) -> NoReturn:
    _print_error("internal error", one_line(error), f"please report it; {_where_the_traceback_is(error)}")
    sys.exit(BUG)


def _where_the_traceback_is(error: Exception) -> str:
    """What `logged_traceback` noted on the error; before there is a folder for it only the terminal can show it."""
    return "; ".join(getattr(error, "__notes__", ())) or f"{FULL_ERROR}=1 shows the traceback"


def _print_error(title: str, message: str, remark: str) -> None:
    lines = "\n".join(map(printable, message.split("\n")))  # names of files and keys may hold what terminals obey
    text = Text.assemble((f"{title}: ", "bold red"), lines, (f" ({remark})" if remark else "", "dim"))
    Console(stderr=True).print(text, soft_wrap=True)
