"""Reward of mathematical answers: math-verify's comparison with the ground truth, in a process of its own."""

from __future__ import annotations

import atexit
import json
import select
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path
from typing import Any

from rlhf_npu.data.prompts import PromptSample

_SECONDS = 30.0
_START_SECONDS = 120.0


def score(response: str, finished: bool, sample: PromptSample) -> float:  # noqa: ARG001
    r"""1 if math-verify finds the response's answer equal to the ground truth, else 0.

    The answer may be in `\boxed{}`, LaTeX or plain text. One that takes too long to compare is wrong.

    Raises:
        ValueError: the ground truth is no mathematical expression.
    """
    return float(_grader().is_right(str(sample.ground_truth), response))


class MathGrader:
    """Asks `math_grader.py`, which runs in a child process and is started anew when it hangs or dies.

    A response such as 9^9^9^9 can hold SymPy for hours. math-verify's own time limits are signals, which
    only a main thread can take, and a worker may score in any thread.
    """

    def __init__(self, seconds: float = _SECONDS) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def is_right(self, ground_truth: str, response: str) -> bool:
        """Whether the response answers as the ground truth does; False where that takes over `seconds`.

        Raises:
            ValueError: the ground truth is no mathematical expression.
            RuntimeError: the child process does not start.
        """
        with self._lock:
            reply = self._ask({"ground_truth": ground_truth, "response": response})
        if "error" in reply:
            raise ValueError(reply["error"])
        return bool(reply["right"])

    def close(self) -> None:
        """End the child process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _ask(self, question: dict[str, str]) -> dict[str, Any]:
        if self._process is not None and self._process.poll() is not None:
            self.close()
        process = self._process or self._start()
        assert process.stdin is not None
        process.stdin.write(json.dumps(question) + "\n")
        process.stdin.flush()
        line = _read_line(process, self._seconds)
        if not line:
            self.close()
            return {"right": False}
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _start(self) -> subprocess.Popen[str]:
        # -P: the child must find the package math_verify, not this file of the same name beside it.
        command = [sys.executable, "-P", str(Path(__file__).with_name("math_grader.py"))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if not _read_line(self._process, _START_SECONDS):
            self.close()
            raise RuntimeError(f"{' '.join(command)} did not start; its own message is on stderr")
        return self._process


def _read_line(process: subprocess.Popen[str], seconds: float) -> str:
    """The child's next line, or nothing where it says none in time or has died."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], seconds)
    return process.stdout.readline() if ready else ""


@cache
def _grader() -> MathGrader:
    grader = MathGrader()
    atexit.register(grader.close)
    return grader
