"""Where metrics go: the terminal, a JSON-lines file, TensorBoard, Weights & Biases."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from omegaconf import OmegaConf

from rlhf_npu.config import PPOConfig, RootConfig, TrainerConfig
from rlhf_npu.config.algorithm import OF_GROUPS
from rlhf_npu.edges import errors_as, one_line
from rlhf_npu.errors import ConfigError
from rlhf_npu.trainer.metrics import Metrics
from rlhf_npu.trainer.mismatch_watch import MismatchWatch
from rlhf_npu.trainer.output import OutputFolder
from rlhf_npu.trainer.reward_signal import Failed, Filled, RewardSignal, Ungradable
from rlhf_npu.trainer.terminal import Terminal
from rlhf_npu.trainer.watch import Watch, Watcher


class Tracker(Protocol):
    """Takes a step's metrics."""

    def log(self, metrics: Metrics, step: int) -> None:
        """Record `metrics` of `step`."""

    def close(self) -> None:
        """Write what is still buffered."""


class JsonLines:
    """Appends one object a step; each line is whole on the disk before the next step begins."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a")

    def log(self, metrics: Metrics, step: int) -> None:
        """Write one line."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """Event files in `tensorboard/`."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def log(self, metrics: Metrics, step: int) -> None:
        """Write one scalar a metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WandB:
    """A Weights & Biases run; WANDB_MODE=offline keeps it on this machine."""

    def __init__(self, config: RootConfig, folder: Path) -> None:
        import wandb

        resolved: Any = OmegaConf.to_container(OmegaConf.structured(config))
        trainer = config.trainer
        self._run = wandb.init(
            project=trainer.project_name, name=trainer.experiment_name, config=resolved, dir=str(folder)
        )

    def log(self, metrics: Metrics, step: int) -> None:
        """Send one step."""
        self._run.log(metrics, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def check_trackers(config: TrainerConfig) -> None:
    """Check that each tracker of `trainer.logger` can be opened, without opening it.

    Raises:
        ConfigError: its library is missing, or wandb would refuse the run: no key, a name that it does not take.
    """
    if "tensorboard" in config.logger:
        with errors_as(ConfigError, _cannot_open("tensorboard")):
            importlib.import_module("torch.utils.tensorboard")
    if "wandb" in config.logger:
        with errors_as(ConfigError, f"{_cannot_open('wandb')} (trainer.project_name={config.project_name})"):
            import wandb

            wandb.Settings(project=config.project_name, run_name=config.experiment_name)
        _check_wandb_key()


def _check_wandb_key() -> None:
    if os.environ.get("WANDB_MODE", "online") in ("offline", "disabled", "dryrun"):
        return
    import wandb

    what = f"{_cannot_open('wandb')}; run `wandb login` or set WANDB_API_KEY, or WANDB_MODE=offline to stay local"
    with errors_as(ConfigError, what):
        # Without a question on the terminal, where nobody may be.
        if not wandb.login(prompt=False):
            raise ConfigError(what)


def _cannot_open(name: str) -> str:
    return f"trainer.logger={name}: cannot be opened"


class Trackers:
    """The trackers of `trainer.logger`, as one; a context manager that closes them.

    A tracker that fails once the run is under way is left out from then on, with a warning on the terminal: a full
    disk or a lost network must not cost the run.

    Raises:
        ConfigError: a tracker cannot be opened; those opened before are closed.
    """

    def __init__(
        self, config: RootConfig, output: OutputFolder, terminal: Terminal, watchers: Sequence[Watcher] = ()
    ) -> None:
        makers: dict[str, Callable[[], Tracker]] = {
            "console": lambda: terminal,
            "jsonl": lambda: JsonLines(output.metrics),
            "tensorboard": lambda: TensorBoard(output.path / "tensorboard"),
            "wandb": lambda: WandB(config, output.path),
        }
        self.history: list[tuple[int, Metrics]] = []
        self._terminal = terminal
        self._trackers: dict[str, Tracker] = {}
        for name in dict.fromkeys(config.trainer.logger):
            try:
                with errors_as(ConfigError, _cannot_open(name)):
                    self._trackers[name] = makers[name]()
            except ConfigError:
                self.close()
                raise
        self._trackers["watch"] = Watch(terminal, watchers)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log(self, metrics: Metrics, step: int) -> None:
        """Record `metrics` of `step` everywhere."""
        self.history.append((step, metrics))
        for name in list(self._trackers):
            self._attempt(name, f"does not take step {step} and is left out from now on", "log", metrics, step)

    def close(self) -> None:
        """Close every tracker, whatever becomes of the others."""
        for name in list(self._trackers):
            self._attempt(name, "could not be closed; its last steps may be missing", "close")
        self._trackers.clear()

    def _attempt(self, name: str, failure: str, method: str, *arguments: Any) -> None:
        try:
            getattr(self._trackers[name], method)(*arguments)
        except Exception as error:  # noqa: BLE001  # whatever a tracker's library raises
            del self._trackers[name]
            self._terminal.warn(f"trainer.logger={name} {failure}: {one_line(error)}")


def watchers_of(config: PPOConfig, output: OutputFolder) -> list[Watcher]:
    """What PPO's loop is watched for."""
    relative = config.algorithm.adv_estimator in OF_GROUPS
    rollouts = output.rollouts
    return [RewardSignal(relative, rollouts), Ungradable(rollouts), Failed(rollouts), Filled(), MismatchWatch()]
