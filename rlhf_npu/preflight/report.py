"""A check's outcome, and the report of all of them: lines on the terminal, and a file that can be sent."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from allocator import OutOfMemoryError, SleepPoolError
from rlhf_npu.preflight.facts import facts, scrubbed, without_addresses

_MIB = 1 << 20
_GIB = 1 << 30


class Status(StrEnum):
    """How a check went; `INFO` is a value that cannot be wrong, or one that is not there."""

    OK = "ok"
    INFO = "info"
    WARNING = "warning"
    FAILED = "failed"


_STYLES = {Status.OK: "green", Status.INFO: "dim", Status.WARNING: "yellow", Status.FAILED: "bold red"}


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name: what was looked at.
        status: how it went.
        value: what was seen.
        advice: what to do, for what is not ok.
        measured: the numbers behind `value`, for programs: bytes, seconds, GiB/s.
        traceback: where an error came up that no check expects; in the file alone.
    """

    name: str
    status: Status
    value: str
    advice: str = ""
    measured: Mapping[str, float] = field(default_factory=dict)
    traceback: str = ""


def attempt(name: str, check: Callable[[], Check], advice: str = "") -> Check:
    """The check's outcome; an error of the pool is a failure in the pool's own words."""
    try:
        return check()
    except OutOfMemoryError as error:
        return Check(name, Status.FAILED, str(error), advice, {"needed": error.needed, "free": error.free})
    except SleepPoolError as error:
        return Check(name, Status.FAILED, str(error), advice)


def readable(size: int) -> str:
    """Bytes as a person reads them."""
    if size < _MIB:
        return f"{size / 1024:g} KiB"
    return f"{size / _GIB:.2f} GiB" if size >= _GIB else f"{size / _MIB:.0f} MiB"


class Report:
    """Shows each check as soon as it is done, and keeps it for the end."""

    def __init__(self, console: Console) -> None:
        self.device = ""
        self._console = console
        self._sections: list[tuple[str, list[Check]]] = []

    @property
    def failed(self) -> bool:
        return any(check.status is Status.FAILED for _, checks in self._sections for check in checks)

    def add(self, section: str, checks: Iterable[Check]) -> bool:
        """Adds and shows the checks of a section, and says whether none of them failed."""
        done: list[Check] = []
        self._sections.append((section, done))
        self._console.print(Text(section, "bold"))
        for check in checks:
            done.append(check)
            self._console.print(_line(check))
        return not any(check.status is Status.FAILED for check in done)

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Within it an error that no check expects is a failed check, and what was done until then is kept."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  # told as a failure, with its traceback in the file
            after = next((done[-1].name for _, done in reversed(self._sections) if done), "the start")
            words = f"after {after}: {type(error).__name__}: {error}"
            advice = "report this as a bug, with the file that --report writes"
            self.add("unexpected", [Check("error", Status.FAILED, words, advice, traceback=traceback.format_exc())])

    def show_summary(self) -> None:
        """One line: how many checks failed and how many warn."""
        statuses = [check.status for _, checks in self._sections for check in checks]
        failed, warnings = statuses.count(Status.FAILED), statuses.count(Status.WARNING)
        self._console.print(
            Text(f"{self.device}: {failed} failed, {warnings} with a warning", "bold red" if failed else "bold green")
        )

    def write(self, path: Path) -> None:
        """Writes all that is known of this machine and of each check as JSON, without personal data."""
        checks = [_entry(section, check) for section, checks in self._sections for check in checks]
        content = {"device": self.device, "failed": self.failed, **facts(), "checks": checks}
        path.write_text(json.dumps(content, indent=2) + "\n")


def _entry(section: str, check: Check) -> dict[str, object]:
    # What has four numbers among the versions is a version.
    clean = scrubbed if section == "versions" else without_addresses
    return {
        "section": section,
        "name": check.name,
        "status": str(check.status),
        "value": clean(check.value),
        "advice": clean(check.advice),
        "measured": dict(check.measured),
        **({"traceback": clean(check.traceback)} if check.traceback else {}),
    }


def _line(check: Check) -> Table:
    style = _STYLES[check.status]
    words = Text(check.value)
    if check.advice:
        words.append(f"\n-> {check.advice}", style)
    line = Table.grid(padding=(0, 1))
    line.add_column(width=9)
    line.add_column(width=26)
    line.add_column(overflow="fold")
    line.add_row(Text(f"  {check.status}", style), Text(check.name), words)
    return line
