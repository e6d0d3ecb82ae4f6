"""Tries a reward function on real prompts before a run starts, in a process of its own.

There it may exit, crash, print, start threads or take a signal without harm to the caller, and it is the main thread
that calls it, as in a worker. Importing its file is part of that.
"""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rlhf_npu.config import RewardConfig
from rlhf_npu.data.sample import PromptSample
from rlhf_npu.errors import RewardError
from rlhf_npu.rewards.contract import Response
from rlhf_npu.rewards.grading import RewardFunction
from rlhf_npu.rewards.loading import load_reward

SECONDS = 30.0
_PARENT_DIED = 1  # PR_SET_PDEATHSIG
# What a function may use that works only in a worker; a failure inside these says nothing about a run.
_WORKERS_OWN = ("deepspeed", "ray", "torch.cuda", "torch.distributed", "torch_npu", "vllm")
_ENVIRONMENT = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # Ray would start a cluster at the first call
}


@dataclass(frozen=True)
class Trial:
    """How a trial went.

    Attributes:
        answered: responses that got a score.
        seconds: what that took, without loading the function.
        warning: why the rest could not be tried; empty if all was.
    """

    answered: int
    seconds: float
    warning: str = ""


def try_reward(config: RewardConfig, samples: Sequence[PromptSample], seconds: float) -> Trial:
    """Score two responses to each of `samples`: an empty one, and the ground truth as text.

    Args:
        seconds: how long it may take in all; where that is not enough, the trial ends with a warning.

    Raises:
        RewardError: there is no such function, it failed, returned what is no reward, or ended its process.
    """
    with tempfile.TemporaryFile() as request, tempfile.TemporaryFile("w+") as replies, tempfile.TemporaryFile() as log:
        pickle.dump((config, list(samples)), request)
        request.seek(0)
        status = _run_child(request, replies.fileno(), log, seconds)
        replies.seek(0)
        lines = [json.loads(line) for line in replies if line.endswith("\n")]
        log.seek(0)
        return _outcome(config, lines, status, log.read().decode(errors="replace"), seconds)


def _run_child(request: IO[bytes], replies: int, log: IO[bytes], seconds: float) -> int | None:
    """The child's exit status; None where it was ended for taking longer than `seconds`."""
    path = os.pathsep.join(place or str(Path.cwd()) for place in sys.path)
    child = subprocess.Popen(
        [sys.executable, "-P", __file__, str(replies)],
        stdin=request,
        stdout=log,
        stderr=log,
        pass_fds=[replies],
        env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": path},
        start_new_session=True,
    )
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # with what the function has started
        child.wait()


def _outcome(config: RewardConfig, lines: list[dict[str, Any]], status: int | None, log: str, seconds: float) -> Trial:
    name = str(config)
    answers = [line["seconds"] for line in lines if "seconds" in line]
    trial = Trial(len(answers), sum(answers))
    failure = next((line for line in lines if "error" in line), None)
    if failure is not None and failure["workers_own"]:
        warning = f"{name} could not be tried outside a worker: {failure['error'].removeprefix(name).lstrip(': ')}"
        return Trial(trial.answered, trial.seconds, warning)
    if failure is not None:
        error = RewardError(failure["error"])
        error.add_note(failure["traceback"])
        raise error
    if status is None:
        warning = (
            f"{name} scored {trial.answered} responses of a trial within {seconds:g} s, then it was not waited for"
        )
        return Trial(trial.answered, trial.seconds, warning)
    if not any("finished" in line for line in lines):
        ending = f"signal {-status}" if status < 0 else f"exit status {status}"
        last = next((f": {line.strip()}" for line in reversed(log.splitlines()) if line.strip()), "")
        raise RewardError(f"{name}: it ended its process ({ending}){last[:300]}")
    return trial


def _answer(request: IO[bytes], replies: IO[str]) -> None:
    config, samples = pickle.load(request)
    try:
        reward = load_reward(config)
        responses = [Response(text, True, sample) for sample in samples for text in ("", _as_response(sample))]
        for part in [responses] if reward.scores_batches else [[response] for response in responses]:
            seconds = _seconds(reward, part) / len(part)
            for _ in part:
                _write(replies, seconds=seconds)
        _write(replies, finished=True)
    except RewardError as error:
        text = "".join(traceback.format_exception(error))
        _write(replies, error=str(error), workers_own=_is_workers_own(error.__cause__), traceback=text)
    except KeyboardInterrupt:  # Ctrl-C does not reach this process
        text = f"{config}: it raises KeyboardInterrupt when it is imported"
        _write(replies, error=text, workers_own=False, traceback=traceback.format_exc())


def _seconds(reward: RewardFunction, responses: Sequence[Response]) -> float:
    start = time.perf_counter()
    reward.grade_all(responses)
    return time.perf_counter() - start


def _as_response(sample: PromptSample) -> str:
    truth = sample.ground_truth
    return str(truth) if isinstance(truth, str | int | float) else "0"


def _is_workers_own(error: BaseException | None) -> bool:
    """Whether it was raised inside a library that works only in a worker, and that is there."""
    if isinstance(error, ImportError):
        return False
    frames = traceback.walk_tb(error.__traceback__ if error else None)
    places = [str(frame.f_globals.get("__name__")) for frame, _ in frames]
    return any(place == own or place.startswith(f"{own}.") for place in places for own in _WORKERS_OWN)


def _write(replies: IO[str], **reply: Any) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


def main() -> None:
    """Read a pickled request from stdin and write a JSON line an answer into the file descriptor that is named."""
    ctypes.CDLL(None).prctl(_PARENT_DIED, signal.SIGKILL)
    with os.fdopen(int(sys.argv[1]), "w") as replies:
        _answer(sys.stdin.buffer, replies)
    sys.stdout.flush()
    os._exit(0)  # threads that the function left running would be waited for


if __name__ == "__main__":
    main()
