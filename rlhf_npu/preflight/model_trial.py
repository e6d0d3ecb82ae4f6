"""Try a model: does it generate as it trains, before and after new weights, however it is cut and has slept?

Each rank is a process of its own (`model_rank`); rank 0 says, as JSON lines, how each part went.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from rlhf_npu.config import ModelConfig
from rlhf_npu.platform import PLATFORMS
from rlhf_npu.run_id import new_run_id
from rlhf_npu.workers.environment import Rank, free_port, static_environment
from rlhf_npu.workers.shared_memory import shared_memory_of

SECONDS = 900
LAST_WORDS = 400


@dataclass(frozen=True)
class Trial:
    """What is tried.

    Attributes:
        model: its folder, precision and attention.
        device: torch's device type.
        ranks: processes, with a device each, that share one rollout engine.
        zero_stage: train the model with DeepSpeed; None only disturbs its weights, for which less memory will do.
        save: whether to save the trained model, to load it again, and to compare.
        gpu_memory_utilization: the rollout's share of a device.
    """

    model: ModelConfig
    device: str
    ranks: int = 1
    zero_stage: int | None = None
    save: bool = False
    gpu_memory_utilization: float = 0.4


@dataclass(frozen=True)
class Outcome:
    """How one part of a trial went.

    Attributes:
        part: "loaded", "level 1", "level 2" or "saved".
        right: whether both engines computed the same function.
        words: the figures, or what went wrong.
        mean, explained: by how many nats the scores differ on average, and by how many rounding lets them.
    """

    part: str
    right: bool
    words: str
    mean: float = 0.0
    explained: float = 0.0


def try_model(trial: Trial) -> Iterator[Outcome]:
    """Run a trial; its outcomes as they come. One that is not right is the last."""
    run_id = new_run_id()
    with tempfile.TemporaryDirectory(prefix="rlhf_npu_trial_") as folder, ExitStack() as stack:
        stack.enter_context(shared_memory_of(run_id))
        processes = _start(trial, run_id, Path(folder), stack)
        outcome = Outcome("loaded", right=False, words="")
        assert processes[0].stdout is not None
        for line in processes[0].stdout:
            if line.startswith("{"):
                outcome = Outcome(**json.loads(line))
                yield outcome
        if processes[0].wait() != 0 and (outcome.right or not outcome.words):
            yield Outcome(f"after {outcome.part}", right=False, words=last_words(Path(folder) / "rank_0.log"))


def _kill(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.kill()


def last_words(log: Path) -> str:
    """The last error that a process printed, or else its last line."""
    lines = log.read_text(errors="replace").strip().splitlines() or ["it was killed without a word"]
    errors = [line for line in lines if re.match(r"(\[rank\d+\]: )?[\w.]*(Error|Exception)\b", line)]
    return [*lines[-1:], *errors][-1][:LAST_WORDS]


def _start(trial: Trial, run_id: str, folder: Path, stack: ExitStack) -> list[subprocess.Popen[str]]:
    platform, processes = PLATFORMS[trial.device], []
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for number in range(trial.ranks):
        rank = Rank(number, trial.ranks, number, trial.ranks)
        log = stack.enter_context((folder / f"rank_{number}.log").open("w"))
        process = subprocess.Popen(
            [sys.executable, "-m", "rlhf_npu.preflight.model_rank", json.dumps(asdict(trial)), str(folder)],
            env=os.environ | static_environment(rank, platform, run_id) | meeting | platform.only_visible(number),
            stdout=subprocess.PIPE if number == 0 else subprocess.DEVNULL,
            stderr=log,
            text=True,
        )
        processes.append(process)
        stack.callback(process.wait)
        stack.callback(process.kill)
    deadline = threading.Timer(SECONDS, _kill, [processes])
    deadline.start()
    stack.callback(deadline.cancel)
    return processes
