"""Watches the metrics of a run for what a person should look at, and says each thing once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from rlhf_npu.trainer.metrics import Metrics
from rlhf_npu.trainer.terminal import Terminal


class Watcher(Protocol):
    """Looks at each step's metrics."""

    def observe(self, metrics: Metrics, step: int) -> list[str]:
        """What to warn of after this step; mostly nothing."""


class Watch:
    """A tracker that prints the warnings of its watchers, whether or not the console is among the loggers."""

    def __init__(self, terminal: Terminal, watchers: Sequence[Watcher]) -> None:
        self._terminal = terminal
        self._watchers = watchers

    def log(self, metrics: Metrics, step: int) -> None:
        """Let all watchers look at `metrics` of `step`."""
        for watcher in self._watchers:
            for warning in watcher.observe(metrics, step):
                self._terminal.warn(f"step {step}: {warning}")

    def close(self) -> None:
        """Nothing is kept open."""
