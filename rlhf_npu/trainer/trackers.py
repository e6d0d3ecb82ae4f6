"""Where metrics go: the terminal, a JSON-lines file, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from rlhf_npu.config import PPOConfig
from rlhf_npu.trainer.metrics import Metrics
from rlhf_npu.trainer.mismatch_watch import MismatchWatch
from rlhf_npu.trainer.output import OutputFolder
from rlhf_npu.trainer.reward_signal import RewardSignal, Ungradable
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

    def __init__(self, config: PPOConfig, folder: Path) -> None:
        import wandb
        from omegaconf import OmegaConf

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


class Trackers:
    """The trackers of `trainer.logger`, as one; a context manager that closes them."""

    def __init__(self, config: PPOConfig, output: OutputFolder, terminal: Terminal) -> None:
        makers: dict[str, Callable[[], Tracker]] = {
            "console": lambda: terminal,
            "jsonl": lambda: JsonLines(output.metrics),
            "tensorboard": lambda: TensorBoard(output.path / "tensorboard"),
            "wandb": lambda: WandB(config, output.path),
        }
        self.history: list[tuple[int, Metrics]] = []
        self._trackers = [makers[name]() for name in config.trainer.logger]
        relative = config.algorithm.adv_estimator == "grpo"
        watchers: list[Watcher] = [
            RewardSignal(relative, output.rollouts),
            Ungradable(output.rollouts),
            MismatchWatch(),
        ]
        self._trackers.append(Watch(terminal, watchers))

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: object) -> None:
        for tracker in self._trackers:
            tracker.close()

    def log(self, metrics: Metrics, step: int) -> None:
        """Record `metrics` of `step` everywhere."""
        self.history.append((step, metrics))
        for tracker in self._trackers:
            tracker.log(metrics, step)
