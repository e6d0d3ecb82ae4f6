"""What a person sees: a progress bar, a line a step, a table of where the time went, a summary."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from rlhf_npu.trainer.metrics import Metrics

History = Sequence[tuple[int, Metrics]]
VALIDATION = "val-core/"
# The issue of a step's time: what the table shows, in the order in which a step runs.
TIME_PARTS = (
    ("generate", ("gen",)),
    ("sleep", ("sleep",)),
    ("reward", ("reward", "reward_model")),
    ("train: log-probabilities, values, advantages", ("old_log_prob", "ref", "values", "adv")),
    ("train: critic", ("update_critic",)),
    ("train: actor", ("update_actor",)),
    ("wake up", ("wake_up",)),
    ("reshard", ("reshard",)),
    ("train", ("update",)),
    ("validate", ("testing",)),
    ("save", ("save_checkpoint",)),
)
Line = Sequence[tuple[str, str, str]]
PPO_LINE = (
    ("reward", "critic/score/mean", "{:.3f}"),
    ("loss", "actor/pg_loss", "{:+.4f}"),
    ("kl", "actor/ppo_kl", "{:.1e}"),
    ("entropy", "actor/entropy", "{:.3f}"),
    ("vf_loss", "critic/vf_loss", "{:.4f}"),
    ("grad", "actor/grad_norm", "{:.2f}"),
    ("length", "response_length/mean", "{:.1f}"),
    ("step", "timing_s/step", "{:.2f}s"),
    ("tok/s", "perf/throughput", "{:.0f}"),
)


class Terminal:
    """The tracker behind `console`."""

    def __init__(self, total_steps: int, line: Line, console: Console | None = None) -> None:
        """Print nothing yet; `line` has the label, the metric and the format of what a step's line shows."""
        self._line = line
        self.console = console or Console()
        self._total_steps = total_steps
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task("training", total=total_steps)

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        """Say what takes long now, with a spinner where there is a terminal."""
        self.console.print(f"{what} ...", style="dim", markup=False, soft_wrap=True)
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            bar.add_task(what, total=None)
            yield

    @contextmanager
    def counting(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """Say what takes long now, with a bar where there is a terminal; what it yields moves the bar on."""
        self.console.print(f"{what} ...", style="dim", markup=False, soft_wrap=True)
        text = TextColumn("{task.description}", markup=False)
        columns = (text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            task = bar.add_task(what, total=total)
            yield lambda done: bar.advance(task, done)

    def say(self, line: str) -> None:
        """Print a line that is not a step's."""
        self.console.print(Text(line, "dim"), soft_wrap=True)

    def log(self, metrics: Metrics, step: int) -> None:
        """Print one line and move the progress bar."""
        if step > 0:
            self._progress.start()
            self._progress.update(self._task, completed=step)
        shown = [f"{label} {pattern.format(metrics[name])}" for label, name, pattern in self._line if name in metrics]
        held_out = [
            f"[bold]{escape(name)} {metrics[name]:.3f}[/bold]" for name in metrics if name.startswith(VALIDATION)
        ]
        self.console.print(f"step {step}/{self._total_steps}  " + "  ".join(shown + held_out), soft_wrap=True)

    def warn(self, *warnings: str) -> None:
        """Print one line a warning."""
        for warning in warnings:
            self.console.print(Text.assemble(("warning: ", "bold yellow"), warning), soft_wrap=True)

    def close(self) -> None:
        """Take the progress bar away."""
        self._progress.stop()

    def time_table(self, history: History) -> Table:
        """Where the time of the steps went, in seconds a step and as a share; the first step warms up."""
        steps = [metrics for step, metrics in history if step > 0]
        steady = steps[1:] or steps
        whole = fmean(metrics["timing_s/step"] for metrics in steady)
        table = Table(title=f"Where the time went: {whole:.2f} s a step", title_justify="left")
        for column in ("part", "s a step", "share", "first step"):
            table.add_column(column, justify="left" if column == "part" else "right")
        for name, parts in TIME_PARTS:
            first, mean = _seconds(steps[0], parts), fmean(_seconds(metrics, parts) for metrics in steady)
            if first or mean:
                table.add_row(name, f"{mean:.3f}", f"{mean / whole:.0%}", f"{first:.3f}")
        return table

    def summary(self, history: History, output: str, seconds: float) -> None:
        """Print the table of times, how the rewards moved, and where the results lie."""
        self.console.print(self.time_table(history))
        for name, values in _curves(history).items():
            best = min(values) if name.endswith("/loss") else max(values)
            self.console.print(f"{name}: {values[0]:.3f} -> {values[-1]:.3f} (best {best:.3f})", markup=False)
        self.console.print(
            f"{self._total_steps} steps in {seconds:.0f} s; results in {output}", soft_wrap=True, markup=False
        )


def _seconds(metrics: Metrics, parts: Sequence[str]) -> float:
    return sum(metrics.get(f"timing_s/{part}", 0.0) for part in parts)


def _curves(history: History) -> dict[str, list[float]]:
    curves: dict[str, list[float]] = {}
    for _, metrics in history:
        for name, value in metrics.items():
            if name.startswith(VALIDATION) or name in ("critic/score/mean", "train/loss"):
                curves.setdefault(name, []).append(value)
    return curves
