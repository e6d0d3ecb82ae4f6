"""Reward of mathematical answers: math-verify's comparison with the ground truth, in a process of its own."""

from __future__ import annotations

import atexit
import json
import re
import select
import subprocess
import sys
import threading
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

from rlhf_npu.data.sample import PromptSample
from rlhf_npu.rewards.contract import UngradableError, shown

_SECONDS = 30.0
_START_SECONDS = 120.0
_NUMBER = re.compile(r"-?\d{1,30}(\.\d{1,30})?")  # what needs no asking


def score(response: str, finished: bool, sample: PromptSample) -> float:  # noqa: ARG001
    r"""1 if math-verify finds the response's answer equal to the ground truth, else 0.

    The answer may be in `\boxed{}`, LaTeX or plain text. One that takes too long to compare is wrong. Signs of
    currencies count for nothing; a percentage equals the number before its sign as well as a hundredth of that.

    Raises:
        UngradableError: the ground truth is no mathematical expression.
    """
    return float(_grader().is_right(_expression(sample), response))


def check_sample(sample: PromptSample) -> None:
    """Refuse a record whose ground truth math-verify cannot read.

    Raises:
        UngradableError: says what it is.
    """
    expression = _expression(sample)
    if not _NUMBER.fullmatch(expression):
        _check_expression(expression)


def _expression(sample: PromptSample) -> str:
    truth = sample.ground_truth
    if isinstance(truth, bool) or not isinstance(truth, str | int | float | Decimal):
        raise UngradableError(
            f"the ground truth {shown(truth)} is no mathematical expression; it must be text or a number"
        )
    return str(truth)


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
            UngradableError: the ground truth is no mathematical expression.
            RuntimeError: the child process does not start.
        """
        return self._answer({"ground_truth": ground_truth, "response": response})

    def can_read(self, ground_truth: str) -> bool:
        """True where the ground truth is a mathematical expression; False where that takes over `seconds`.

        Raises:
            UngradableError: it is none.
            RuntimeError: the child process does not start.
        """
        return self._answer({"ground_truth": ground_truth})

    def close(self) -> None:
        """End the child process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _answer(self, question: dict[str, str]) -> bool:
        with self._lock:
            try:
                reply = self._ask(question)
            except BaseException:  # interrupted: the answer to this question would be taken for that to the next
                self.close()
                raise
        if "error" in reply:
            raise UngradableError(reply["error"])
        return bool(reply["right"])

    def _ask(self, question: dict[str, str]) -> dict[str, Any]:
        if self._process is not None and self._process.poll() is not None:
            self.close()
        process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            line = _read_line(process, self._seconds)
        except BrokenPipeError:  # it has died just now
            line = ""
        if not line:
            self.close()
            return {"right": False}
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _start(self) -> subprocess.Popen[str]:
        # -P: the child must find the package math_verify, not this file of the same name beside it.
        command = [sys.executable, "-P", str(Path(__file__).with_name("math_grader.py"))]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            process_group=0,  # Ctrl-C is for its parent, and would make it print a traceback
        )
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


@cache
def _check_expression(expression: str) -> None:
    if not _grader().can_read(expression):
        raise UngradableError(f"the ground truth {shown(expression)} is too much for math-verify to read")
