from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest

from rlhf_npu.config import RewardConfig
from rlhf_npu.rewards import UngradableError, load_reward
from rlhf_npu.rewards.math_verify import MathGrader, check_sample, score
from tests.rewards.samples import sample

ORPHAN = """
import os, signal
from rlhf_npu.rewards.math_verify import MathGrader
grader = MathGrader()
grader.is_right("5", "5")
print(grader._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


# Ctrl-C reaches the whole process group.
INTERRUPTED = """
import os, signal, time
from rlhf_npu.rewards.math_verify import MathGrader
grader = MathGrader()
grader.is_right("5", "5")
try:
    os.killpg(0, signal.SIGINT)
    time.sleep(20)
except KeyboardInterrupt:
    time.sleep(0.5)
    print("interrupted")
"""


@pytest.fixture
def impatient() -> Iterator[MathGrader]:
    grader = MathGrader(seconds=1.0)
    yield grader
    grader.close()


@pytest.mark.parametrize(
    ("ground_truth", "response", "reward"),
    [
        ("72", "She sold 48 + 24, so it is 72.", 1.0),
        (72, r"\boxed{72}", 1.0),
        ("0.5", r"The answer is $\frac{1}{2}$.", 1.0),
        (r"\frac{1}{2}", r"\boxed{0.5}", 1.0),
        (r"$x + 1$", r"\boxed{1 + x}", 1.0),
        (r"\boxed{(1, 2)}", r"\boxed{(1,2)}", 1.0),
        ("72", r"\boxed{71}", 0.0),
        ("72", "I do not know.", 0.0),
        ("72", "", 0.0),
    ],
)
def test_right_and_wrong_answers(ground_truth: object, response: str, reward: float) -> None:
    assert score(response, True, sample(ground_truth)) == reward


def test_any_thread_may_ask() -> None:
    rewards: dict[int, float] = {}

    def ask(number: int) -> None:
        rewards[number] = score(f"it is {number}", True, sample("3"))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert rewards == {number: float(number == 3) for number in range(6)}


def test_an_answer_that_cannot_be_computed_is_wrong_and_the_next_is_graded(impatient: MathGrader) -> None:
    assert impatient.is_right("5", "it is 5")
    start = time.monotonic()
    assert not impatient.is_right("5", r"\boxed{9^{9^{9^9}}}")
    assert time.monotonic() - start < 4
    assert impatient.is_right("5", "it is 5")


def test_a_dead_child_is_replaced(impatient: MathGrader) -> None:
    assert impatient.is_right("5", "it is 5")
    child = impatient._process
    assert child is not None
    child.kill()
    child.wait()
    assert impatient.is_right("5", "it is 5")


def test_ctrl_c_prints_nothing_of_the_child() -> None:
    parent = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, start_new_session=True, check=False
    )
    assert (parent.stdout, parent.stderr) == ("interrupted\n", "")


def test_a_child_that_does_not_start_is_an_error(impatient: MathGrader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(RuntimeError, match="did not start"):
        impatient.is_right("5", "5")


def test_the_child_ends_with_its_parent() -> None:
    parent = subprocess.run([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True, check=False)
    assert parent.returncode == -signal.SIGKILL
    child = Path("/proc") / parent.stdout.strip()
    deadline = time.monotonic() + 10
    while child.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.exists()


@pytest.mark.parametrize(
    ("ground_truth", "response", "reward"),
    [
        (r"\$0.90", r"\boxed{0.90}", 1.0),
        (r"\$0.90", r"It costs \$0.90.", 1.0),
        (r"\$0.90", "It costs $0.90", 1.0),
        (r"\$1,234.50", r"\boxed{\$1234.50}", 1.0),
        ("$5", r"\boxed{5}", 1.0),
        ("€5", r"\boxed{5€}", 1.0),
        ("0.9", r"\boxed{\$0.90}", 1.0),
        (r"\$0.90", r"\boxed{0.80}", 0.0),
        ("50%", r"\boxed{50}", 1.0),
        ("50", r"\boxed{50%}", 1.0),
        (r"50\%", r"\boxed{50\,\%}", 1.0),
        ("50%", r"\boxed{0.5}", 1.0),
        ("0.5", r"\boxed{50\%}", 1.0),
        (r"\frac{1}{2}", "it is 50 %", 1.0),
        ("50%", r"\boxed{51\%}", 0.0),
        ("50%", r"\boxed{5}", 0.0),
        (Decimal("0.50"), r"\boxed{\frac{1}{2}}", 1.0),
    ],
)
def test_prices_and_percentages(ground_truth: object, response: str, reward: float) -> None:
    assert score(response, True, sample(ground_truth)) == reward


@pytest.mark.parametrize("ground_truth", ["", "  ", None, True, ["72"], {"answer": 72}, b"72"])
def test_a_ground_truth_that_is_no_mathematics(ground_truth: object) -> None:
    with pytest.raises(UngradableError, match="is no mathematical expression"):
        check_sample(sample(ground_truth))
    graded = load_reward(RewardConfig("math_verify")).grade("5", True, sample(ground_truth))
    assert graded.score == 0.0
    assert graded.ungradable is not None
    assert "is no mathematical expression" in graded.ungradable


@pytest.mark.parametrize("ground_truth", ["72", 72, -0.5, r"\frac{1}{2}", r"\$0.90", "50%", "x = 5", "(1, 2)"])
def test_a_ground_truth_that_can_be_graded(ground_truth: object) -> None:
    check_sample(sample(ground_truth))
