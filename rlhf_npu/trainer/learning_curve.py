"""The picture of how the reward moved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlhf_npu.trainer.metrics import Metrics


def draw_learning_curve(history: Sequence[tuple[int, Metrics]], path: Path) -> None:
    """Draw training reward and held-out reward over steps into a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name in _rewards(history):
        points = [(step, metrics[name]) for step, metrics in history if name in metrics]
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, marker="o" if name.startswith("val-core/") else None, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("mean reward")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _rewards(history: Sequence[tuple[int, Metrics]]) -> list[str]:
    names = dict.fromkeys(name for _, metrics in history for name in metrics)
    return [name for name in names if name.startswith("val-core/") or name == "critic/score/mean"]
