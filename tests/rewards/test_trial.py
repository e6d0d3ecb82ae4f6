"""A reward function is tried on real prompts before a run, in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlhf_npu.config import RewardConfig
from rlhf_npu.errors import RewardError
from rlhf_npu.rewards.trial import Trial, try_reward
from tests.rewards.samples import sample


def attempt(folder: Path, source: str, seconds: float = 60, **kwargs: Any) -> Trial:
    (folder / "reward.py").write_text(source)
    config = RewardConfig(f"{folder}/reward.py:score", kwargs)
    return try_reward(config, [sample("5", "sums"), sample(6, "others", index=1)], seconds)


def has_ended(process: int) -> bool:
    deadline = time.monotonic() + 10
    while psutil.pid_exists(process) and psutil.Process(process).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_each_prompt_is_answered_with_nothing_and_with_the_ground_truth(tmp_path: Path) -> None:
    source = (
        "import os, sibling_of_trial\n"
        "def score(response, ground_truth, finished, log):\n"
        "    print('seen')\n"
        "    with open(log, 'a') as file: file.write(f'{response!r} {ground_truth!r} {finished} {os.getpid()}\\n')\n"
        "    return {'score': sibling_of_trial.ONE}\n"
    )
    (tmp_path / "sibling_of_trial.py").write_text("ONE = 1.0")
    trial = attempt(tmp_path, source, log=str(tmp_path / "log"))
    assert (trial.answered, trial.warning) == (4, "")
    lines = [line.rpartition(" ") for line in (tmp_path / "log").read_text().splitlines()]
    assert [line for line, _, _ in lines] == ["'' '5' True", "'5' '5' True", "'' 6 True", "'6' 6 True"]
    assert str(os.getpid()) not in {process for _, _, process in lines}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("import sys; sys.exit('no key')", "response '', it raised SystemExit: no key"),
        ("raise KeyboardInterrupt", "response '', it raised KeyboardInterrupt"),
        ("return float(response)", "response '', it raised ValueError: could not convert string to float"),
        ("return None", "response '', it returned None; it must return a finite number"),
        ("import os; print('disk full'); os._exit(3)", "it ended its process (exit status 3)"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "it ended its process (signal 11)"),
        (
            "pass\nimport no_such_module",
            "cannot import {folder}/reward.py: ModuleNotFoundError: No module named 'no_such",
        ),
        ("pass\nimport os; os._exit(1)", "it ended its process (exit status 1)"),
        ("import os; os._exit(0)", "it ended its process (exit status 0)"),
        ("pass\nscore = 7", "{folder}/reward.py has no function 'score'"),
    ],
)
def test_a_function_that_fails_is_refused(tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(RewardError, match=re.escape(message.format(folder=tmp_path))) as caught:
        attempt(tmp_path, f"def score(response):\n    {body}\n")
    assert f"reward.function={tmp_path}/reward.py:score: " in str(caught.value)


def test_a_file_that_raises_keyboard_interrupt(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"reward\.py:score: it raises KeyboardInterrupt when it is imported"):
        attempt(tmp_path, "raise KeyboardInterrupt\n")


def test_the_traceback_comes_with_the_error(tmp_path: Path) -> None:
    with pytest.raises(RewardError) as caught:
        attempt(tmp_path, "def helper(): return {}['missing']\ndef score(response): return helper()\n")
    assert 'reward.py", line 1, in helper' in "".join(caught.value.__notes__)


def test_a_function_that_takes_long_is_not_waited_for(tmp_path: Path) -> None:
    source = (
        "import subprocess, time\n"
        "def score(response, log):\n"
        "    if response:\n"
        "        with open(log, 'w') as file: file.write(str(subprocess.Popen(['sleep', '600']).pid))\n"
        "        time.sleep(600)\n"
        "    return 0.0\n"
    )
    start = time.monotonic()
    trial = attempt(tmp_path, source, seconds=4, log=str(tmp_path / "log"))
    assert time.monotonic() - start < 10
    assert trial.answered == 1
    assert "scored 1 responses of a trial within 4 s, then it was not waited for" in trial.warning
    assert has_ended(int((tmp_path / "log").read_text()))


@pytest.mark.parametrize(
    "body",
    [
        "import ray; return ray.get_actor('judge') is None",
        "import torch.distributed as dist; return dist.get_world_size()",
    ],
)
def test_what_only_a_worker_has_is_no_failure(tmp_path: Path, body: str) -> None:
    trial = attempt(tmp_path, f"def score(response):\n    {body}\n")
    assert "could not be tried outside a worker: on prompt 0" in trial.warning
    assert trial.answered == 0


def test_threads_that_it_leaves_are_not_waited_for(tmp_path: Path) -> None:
    source = (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()\nscore = lambda response: 0\n"
    )
    assert attempt(tmp_path, source).answered == 4


def test_ctrl_c_ends_the_trial(tmp_path: Path) -> None:
    source = (
        "import os, time\ndef score(response, log):\n    open(log, 'w').write(str(os.getpid()))\n    time.sleep(600)\n"
    )
    log = tmp_path / "log"

    def interrupt() -> None:
        deadline = time.monotonic() + 60
        while not (log.exists() and log.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        attempt(tmp_path, source, log=str(log))
    thread.join()
    assert not psutil.pid_exists(int(log.read_text()))


@pytest.mark.parametrize(
    "source",
    [
        "async def score(response, log): return open(log, 'a').write('1') and 1.0\n",
        "def score(solution_strs, log): return open(log, 'a').write('1' * len(solution_strs)) and [1.0] * 4\n",
    ],
    ids=["async", "batch"],
)
def test_functions_of_other_kinds(tmp_path: Path, source: str) -> None:
    trial = attempt(tmp_path, source, log=str(tmp_path / "log"))
    assert (trial.answered, trial.warning) == (4, "")
    assert (tmp_path / "log").read_text() == "1111"


def test_a_batch_function_that_returns_one_number_too_few(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"on prompt 0 of .*, it returned 3 items for 4 responses"):
        attempt(tmp_path, "def score(solution_strs): return [1.0] * 3\n")


def test_the_sum_of_several(tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text("def one(response): return 1.0\ndef odd(response): return 1 / len(response)\n")
    names = [f"{tmp_path}/reward.py:one", f"{tmp_path}/reward.py:odd"]
    with pytest.raises(RewardError, match=r"reward\.functions: .*reward\.py:odd: on prompt 0 .*ZeroDivisionError"):
        try_reward(RewardConfig(None, functions=names), [sample("5")], 60)
    assert try_reward(RewardConfig(None, functions=[names[0], "digits"]), [sample("5")], 60).answered == 2
