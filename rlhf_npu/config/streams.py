"""Output streams that a run outlives: a pipe that nobody reads any more, a full disk, a terminal that is gone."""

from __future__ import annotations

import io
import os
import sys
from typing import TextIO

from typing_extensions import Buffer


class _LastingFile(io.FileIO):
    """A file that nobody misses: from the first failed write on, what is written to it goes nowhere."""

    def write(self, data: Buffer, /) -> int:
        try:
            return super().write(data)
        except BlockingIOError:
            raise
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return super().write(data)


def use_lasting_streams() -> None:
    """Let the process's own stdout and stderr fail silently, and escape what their encoding does not have."""
    sys.stdout = _lasting(sys.stdout, sys.__stdout__)
    sys.stderr = _lasting(sys.stderr, sys.__stderr__)


def _lasting(stream: TextIO | None, own: TextIO | None) -> TextIO:
    """`stream`, made to last; one that a caller put in the place of the process's `own` stays as it is."""
    if stream is None:  # closed before the process began
        return open(os.devnull, "w")  # noqa: PTH123
    if stream is not own or not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.flush()
    raw = _LastingFile(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=True,
        write_through=stream.write_through,
    )
