"""The folder that a run writes, and the names inside it."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from omegaconf import OmegaConf

from rlhf_npu.config import RootConfig
from rlhf_npu.errors import ConfigError

KEY = "trainer.default_local_dir"
# Ray's copy of a job's working folder, which it deletes after the job.
COPY_OF_WORKING_FOLDER = "working_dir_files"
LOGS = "logs"


class OutputFolder:
    """`config.yaml`, metrics, `rollouts/`, `validation/`, `logs/`, `trace.json`, models and pictures."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().absolute()
        self.kept = False
        self._made: list[Path] = []
        self._before: set[Path] = set()

    @property
    def config(self) -> Path:
        """The resolved configuration; the run that makes this file owns the folder."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object a step."""
        return self.path / "metrics.jsonl"

    @property
    def rollouts(self) -> Path:
        """Training prompts, responses and scores: a file a step and rank."""
        return self.path / "rollouts"

    @property
    def learning_curve(self) -> Path:
        """The picture of held-out and training reward."""
        return self.path / "learning_curve.png"

    @property
    def memory_picture(self) -> Path:
        """The picture of the device's memory over the last step."""
        return self.path / "memory.png"

    @property
    def trace(self) -> Path:
        """The Chrome trace of stages and switches."""
        return self.path / "trace.json"

    def model_folder(self, step: int, final: bool) -> Path:
        """Where the policy of `step` is saved; the last one is called `model`."""
        return self.path / ("model" if final else f"model_step_{step}")

    def claim(self, config: RootConfig) -> bool:
        """Make the folder and write the resolved configuration into it; False if it is another run's.

        Of several processes that claim a folder at the same time one gets it.

        Raises:
            ConfigError: the folder cannot be written.
        """
        try:
            with self._create() as file:
                file.write(OmegaConf.to_yaml(OmegaConf.structured(config)))
        except FileExistsError:
            return False
        except OSError as error:
            self._remove_made()
            raise ConfigError(f"{KEY}={self.path}: cannot be written: {error.strerror}; name another folder") from error
        return True

    def keep(self) -> None:
        """Training begins: from now on there are results in the folder."""
        self.kept = True

    def give_back(self, with_logs: bool) -> None:
        """Remove what this run wrote, so that another one can have the folder, and the folder if this run made it."""
        logs = self.path / LOGS
        for entry in set(self.path.iterdir()) - self._before:
            if entry == logs and not with_logs:
                continue
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        self._remove_made()

    def remove_partial(self) -> None:
        """Remove the model that was being saved when the run ended."""
        for folder in self.path.glob("*.partial"):
            shutil.rmtree(folder)

    def _create(self) -> TextIO:
        while True:
            self._make_folders()
            try:
                self._before = set(self.path.iterdir())
                if self.metrics in self._before:
                    raise FileExistsError(self.metrics)
                return self.config.open("x")
            except FileNotFoundError:
                continue  # a run that had made it has given it back just now

    def _make_folders(self) -> None:
        for folder in [*reversed(self.path.parents), self.path]:
            with suppress(FileExistsError):
                folder.mkdir()
                self._made.append(folder)

    def _remove_made(self) -> None:
        for folder in reversed(self._made):
            with suppress(OSError):  # another run's are in it, or this one's logs
                folder.rmdir()
        self._made = []


@contextmanager
def claim_folder(config: RootConfig) -> Iterator[OutputFolder]:
    """A folder that no other run writes to; given back if the run ends before training has begun.

    Raises:
        ConfigError: another run's results are there, which this one's would be mixed with, or it cannot be written.
    """
    output = _claimed(config)
    try:
        yield output
    except BaseException as error:
        if not output.kept:  # of what failed the workers' logs tell
            output.give_back(with_logs=isinstance(error, KeyboardInterrupt))
        if isinstance(error, KeyboardInterrupt):  # after a failure it holds what could be saved
            output.remove_partial()
        raise


def _claimed(config: RootConfig) -> OutputFolder:
    first = OutputFolder(config.trainer.default_local_dir).path
    if COPY_OF_WORKING_FOLDER in first.parts:
        raise ConfigError(
            f"{KEY}={first}: Ray deletes this copy of the job's working folder after the job; name a folder outside of "
            "it, with an absolute path"
        )
    names = itertools.chain([first.name], (f"{first.name}-{number}" for number in itertools.count(2)))
    for name in names if config.trainer.is_folder_by_clock else [first.name]:
        output = OutputFolder(first.with_name(name))
        trainer = replace(config.trainer, default_local_dir=str(output.path))
        if output.claim(replace(config, trainer=trainer)):  # type: ignore[type-var]  # each root is a dataclass
            return output
    raise ConfigError(f"{KEY}={first}: there is a run in it already; name another folder")
