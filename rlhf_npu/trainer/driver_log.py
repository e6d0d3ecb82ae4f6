"""The traceback of a run that failed, in its output folder: the terminal shows one line."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def logged_traceback(file: Path) -> Iterator[None]:
    """Append the traceback of whatever error is raised inside to `file`, and note on the error that it is there."""
    try:
        yield
    except Exception as error:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a", errors="backslashreplace") as log:
                traceback.print_exception(error, file=log)
            error.add_note(f"the traceback is in {file}")
        except OSError as failure:
            error.add_note(f"the traceback could not be written to {file}: {failure.strerror}")
        raise
