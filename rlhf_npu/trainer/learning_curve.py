"""The picture of how the reward, or the loss, moved."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from rlhf_npu.edges import errors_as
from rlhf_npu.errors import ConfigError
from rlhf_npu.trainer.metrics import Metrics

LOSS = "train/loss"


def check_learning_curve() -> None:
    """Draw a curve into memory.

    Raises:
        ConfigError: the library is missing or its settings are wrong.
    """
    with errors_as(ConfigError, "the learning curve cannot be drawn by matplotlib"):
        draw_learning_curve([(0, {"critic/score/mean": 0.0})], io.BytesIO())


def draw_learning_curve(history: Sequence[tuple[int, Metrics]], file: Path | BinaryIO) -> None:
    """Draw training reward and held-out reward, or the loss, over steps into a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    names = _curves(history)
    for name in names:
        points = [(step, metrics[name]) for step, metrics in history if name in metrics]
        steps, values = zip(*points, strict=True)
        label = name.replace("$", r"\$")  # a data source may be called anything; between dollar signs is mathematics
        axes.plot(steps, values, marker="o" if name.startswith("val-core/") else None, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("mean over examples" if LOSS in names else "mean reward")
    axes.grid(alpha=0.3)
    axes.legend()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(file, dpi=120, format="png")


def _curves(history: Sequence[tuple[int, Metrics]]) -> list[str]:
    names = dict.fromkeys(name for _, metrics in history for name in metrics)
    return [name for name in names if name.startswith("val-core/") or name in ("critic/score/mean", LOSS)]
