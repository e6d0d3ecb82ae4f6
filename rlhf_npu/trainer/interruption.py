"""How a run that somebody interrupts ends: with one line that says what there is, and status 130."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rlhf_npu.config import RootConfig
from rlhf_npu.interrupts import INTERRUPTED, interruptible
from rlhf_npu.trainer.driver_log import logged_traceback
from rlhf_npu.trainer.output import OutputFolder, claim_folder
from rlhf_npu.trainer.terminal import Terminal


@contextmanager
def interruptible_run() -> Iterator[None]:
    """Within it a run checks what it can and trains.

    Raises:
        SystemExit: with code 130 after Ctrl-C.
    """
    try:
        with interruptible():
            yield
    except KeyboardInterrupt:
        print("interrupted")
        raise SystemExit(INTERRUPTED) from None


@contextmanager
def run_folder(config: RootConfig, terminal: Terminal) -> Iterator[OutputFolder]:
    """The folder of a run whose workers are stopped when it is left; it keeps the traceback of what ends the run.

    Raises:
        ConfigError: another run's results are there, or it cannot be written.
        SystemExit: with code 130 after Ctrl-C.
    """
    output = None
    try:
        with claim_folder(config) as output, logged_traceback(output.path / "logs" / "driver.log"):
            yield output
    except KeyboardInterrupt:
        results = f"results so far are in {output.path}" if output and output.kept else "training had not begun"
        terminal.console.print(f"interrupted; all workers have stopped; {results}", soft_wrap=True)
        raise SystemExit(INTERRUPTED) from None
