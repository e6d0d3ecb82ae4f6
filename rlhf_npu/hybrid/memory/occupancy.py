"""Who holds how much of a device in which stage, for people to look at."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from rich.table import Table

from rlhf_npu.hybrid.switch_plan import Stage, Tag

MIB, GIB = 1 << 20, 1 << 30
WORKSPACE, TOTAL = "workspace", "total"
ASLEEP = "-"


@dataclass(frozen=True)
class Occupancy:
    """Bytes on one device.

    Attributes:
        tags: the pool's tenants.
        awake: names of those that are awake, for each stage that is shown.
        workspace: what each stage takes beside them.
        capacity: bytes that the device has to give.
    """

    tags: tuple[Tag, ...]
    awake: Mapping[Stage, frozenset[str]]
    workspace: Mapping[Stage, int]
    capacity: int

    def held(self, tag: Tag, stage: Stage) -> int:
        """Bytes of the device that `tag` holds in `stage`."""
        return tag.bytes if tag.name in self.awake[stage] else 0

    def total(self, stage: Stage) -> int:
        """Bytes in use in `stage`."""
        return sum(self.held(tag, stage) for tag in self.tags) + self.workspace[stage]

    def table(self) -> Table:
        """One tag a line and one stage a column."""
        name, unit = self._unit()
        title = f"Memory of one device, in {name}; it has {self.capacity / unit:,.2f}"
        table = Table(title=title, title_justify="left")
        table.add_column("tag", no_wrap=True)
        for stage in self.awake:
            table.add_column(stage.value, justify="right", no_wrap=True)
        for name, cells in self._rows(unit):
            table.add_row(name, *cells, style="bold" if name == TOTAL else None)
        return table

    def draw(self, file: Path | BinaryIO) -> None:
        """Draw one bar a stage, stacked of what holds its memory, into a PNG file."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 4.5), layout="constrained")
        axes = figure.add_subplot()
        stages = list(self.awake)
        names, bottom = [stage.value for stage in stages], [0.0] * len(stages)
        unit_name, unit = self._unit()
        layers = [(tag.name, [self.held(tag, stage) / unit for stage in stages]) for tag in self.tags]
        layers.append((WORKSPACE, [self.workspace[stage] / unit for stage in stages]))
        for name, heights in layers:
            axes.bar(names, heights, bottom=bottom, label=name, color="lightgray" if name == WORKSPACE else None)
            bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
        axes.axhline(self.capacity / unit, color="black", linestyle="--", label="capacity")
        axes.set_ylabel(f"{unit_name} of one device")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            figure.savefig(file, dpi=120, format="png")

    def _unit(self) -> tuple[str, int]:
        return ("GiB", GIB) if max(map(self.total, self.awake)) >= 4 * GIB else ("MiB", MIB)

    def _rows(self, unit: int) -> Iterator[tuple[str, list[str]]]:
        for tag in self.tags:
            yield tag.name, [_cell(self.held(tag, stage), unit) for stage in self.awake]
        yield WORKSPACE, [_cell(self.workspace[stage], unit) for stage in self.awake]
        yield TOTAL, [_cell(self.total(stage), unit) for stage in self.awake]


def _cell(size: int, unit: int) -> str:
    return f"{size / unit:.2f}" if size else ASLEEP
