"""The picture of one step's memory: bytes of each tag over time, with stages and switches marked."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from rlhf_npu.hybrid.switch_report import SwitchReport
from rlhf_npu.trainer.memory_timeline import MemoryPoint, memory_timeline
from rlhf_npu.trainer.switch_times import StepSwitches

GIB = 1 << 30
# A tag has the same colour in every picture: the rollout's are blue, the actor's red, the critic's green.
COLOURS = {
    "weights": "#1f4e8c",
    "kv_cache": "#9ecae1",
    "actor.params": "#b2301c",
    "actor.grads": "#f7a889",
    "actor.optimizer": "#e0663f",
    "critic.params": "#2b7a3d",
    "critic.grads": "#b7dfa8",
    "critic.optimizer": "#69b35c",
    "ref.params": "#7b5aa6",
    "reward.params": "#c9a227",
}
OTHER_COLOURS = ("#8c6d31", "#c49c94", "#17becf", "#bcbd22", "#636363", "#d6616b")
PHASE_COLOURS = {"sleep": "#4d4d4d", "wake_up": "#f2c200", "reshard": "#d400a8"}
LEAST_GAP = 0.035  # between the names of two stages, as a part of the picture's width
NOT_NAMED = 0.001  # as a part of the step, is too short for a name: a stage entered for what follows the step


def draw_memory(step: StepSwitches, file: Path | BinaryIO) -> None:
    """Draw the rank that had most of its device in use into a PNG file; the step is over and entered a stage.

    Tags are stacked in GiB over the seconds of the step. The black line is the driver's count (on the CPU the process's
    resident memory) when a stage begins, the dotted one the peak within it, where it is known; the dashed one is what
    the device has. Bars at the top are the phases of switches.
    """
    from matplotlib.figure import Figure

    rank = _fullest_rank(step)
    reports = step.of_rank(rank)
    picture = _Picture(Figure(figsize=(11, 5.5), layout="constrained"), step)
    picture.tags(memory_timeline(reports, step.ledger_before(rank)))
    picture.count(reports)
    picture.phases(reports)
    picture.stages(reports)
    picture.finish(f"device memory of rank {rank} in {step.name}")
    picture.figure.savefig(file, dpi=120, format="png")


class _Picture:
    """A figure that is drawn part by part, in seconds since the step began."""

    def __init__(self, figure: Any, step: StepSwitches) -> None:
        assert step.ended is not None
        self.figure = figure
        self._axes = figure.add_subplot()
        self._zero = step.began
        self._end = max(step.ended, step.entries[-1][0].entered) - step.began

    def tags(self, points: Sequence[MemoryPoint]) -> None:
        """Stack the tags' bytes."""
        names = _in_order({tag for point in points for tag, size in point.mapped.items() if size})
        times = [0.0, *(self._seconds(point.time) for point in points), self._end]
        states = [points[0].mapped, *(point.mapped for point in points), points[-1].mapped]
        sizes = [[state.get(tag, 0) / GIB for state in states] for tag in names]
        colours = [_colour(tag) for tag in names]
        if names:
            self._axes.stackplot(times, sizes, labels=names, colors=colours, linewidth=0, zorder=2)

    def count(self, reports: Sequence[SwitchReport]) -> None:
        """Draw the driver's count, the peaks, and the capacity."""
        for report, left in zip(reports, self._ends(reports), strict=True):
            self._level(self._seconds(report.entered), left, report.after.used, "-", "in use")
        for report, following in itertools.pairwise(reports):
            if following.left is not None:
                start, left = self._seconds(report.entered), self._seconds(following.began)
                self._level(start, left, following.left.used, ":", "peak in the stage")
        if (capacity := reports[-1].after.capacity) is not None:
            self._axes.axhline(capacity / GIB, color="k", linestyle="--", linewidth=1, label="the device has")

    def phases(self, reports: Sequence[SwitchReport]) -> None:
        """Mark what slept, woke and was resharded."""
        for phase in (phase for report in reports for phase in report.phases):
            colour, span = PHASE_COLOURS[phase.name], (self._seconds(phase.start), self._seconds(phase.end))
            self._axes.axvspan(*span, facecolor=colour, alpha=0.2, zorder=1)
            self._axes.axvspan(*span, ymin=0.96, facecolor=colour, edgecolor=colour, zorder=3, label=phase.name)

    def stages(self, reports: Sequence[SwitchReport]) -> None:
        """Name the stages above the picture, each with its seconds; short ones beside each other get room."""
        spans = zip(reports, (self._seconds(report.entered) for report in reports), self._ends(reports), strict=True)
        long = NOT_NAMED * self._end
        named = [(report.stage.value, start, end) for report, start, end in spans if end - start > long]
        places = spread([(start + end) / 2 / self._end for _, start, end in named], LEAST_GAP)
        transform = self._axes.get_xaxis_transform()
        for (name, start, end), place in zip(named, places, strict=True):
            self._axes.annotate(
                f"{name} {end - start:.2g} s",
                xy=((start + end) / 2, 1.0),
                xytext=(place * self._end, 1.05),
                xycoords=transform,
                textcoords=transform,
                rotation=40,
                rotation_mode="anchor",
                fontsize=8.5,
                arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.6},
                annotation_clip=False,
            )

    def finish(self, title: str) -> None:
        """Axes, legend and title."""
        self._axes.set_xlim(0, self._end)
        self._axes.set_ylim(bottom=0)
        self._axes.set_xlabel("seconds")
        self._axes.set_ylabel("GiB")
        handles, labels = self._axes.get_legend_handles_labels()
        shown = dict(zip(reversed(labels), reversed(handles), strict=True))
        self._axes.legend(shown.values(), shown, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
        self.figure.suptitle(title, x=0.02, ha="left", fontsize=11)

    def _level(self, start: float, end: float, size: int, style: str, label: str) -> None:
        self._axes.plot((start, end), (size / GIB, size / GIB), color="k", linestyle=style, label=label, zorder=4)

    def _ends(self, reports: Sequence[SwitchReport]) -> list[float]:
        """When each stage was left."""
        return [*(self._seconds(report.began) for report in reports[1:]), self._end]

    def _seconds(self, time: float) -> float:
        return min(max(0.0, time - self._zero), self._end)


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Places in rising order, moved so that neighbours are at least `gap` apart and none is right of 1, if they fit."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap) if moved else max(0.0, place))
    limit = 1.0
    for number in reversed(range(len(moved))):
        moved[number] = min(moved[number], limit)
        limit = moved[number] - gap
    return moved


def _fullest_rank(step: StepSwitches) -> int:
    def most(rank: int) -> int:
        reports = step.of_rank(rank)
        peaks = [report.left.used for report in reports[1:] if report.left is not None]
        return max([report.after.used for report in reports] + peaks)

    return max(range(len(step.entries[0])), key=most)


def _in_order(tags: set[str]) -> list[str]:
    known = [tag for tag in COLOURS if tag in tags]
    return known + sorted(tags - COLOURS.keys())


def _colour(tag: str) -> str:
    return COLOURS.get(tag) or OTHER_COLOURS[zlib.crc32(tag.encode()) % len(OTHER_COLOURS)]
