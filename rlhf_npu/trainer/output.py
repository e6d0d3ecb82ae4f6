"""The folder that a run writes, and the names inside it."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

from rlhf_npu.config import PPOConfig
from rlhf_npu.errors import ConfigError


class OutputFolder:
    """`config.yaml`, `metrics.jsonl`, `tensorboard/`, `rollouts/`, `validation/`, `logs/`, models and curve."""

    def __init__(self, path: str) -> None:
        self.path = Path(path).resolve()

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

    def create(self, config: PPOConfig) -> None:
        """Make the folder and write the resolved configuration into it.

        Raises:
            ConfigError: another run wrote its metrics there, which this one's would be mixed with.
        """
        if self.metrics.exists():
            raise ConfigError(
                f"trainer.default_local_dir={self.path}: there is a run in it already; name another folder"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(OmegaConf.structured(config), self.path / "config.yaml")

    def model_folder(self, step: int, final: bool) -> Path:
        """Where the policy of `step` is saved; the last one is called `model`."""
        return self.path / ("model" if final else f"model_step_{step}")
