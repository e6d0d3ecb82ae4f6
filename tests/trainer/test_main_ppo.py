"""`python -m rlhf_npu.main_ppo` as a user runs it: real Ray, DeepSpeed and vLLM on the digit task."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_npu import main_ppo
from rlhf_npu.preflight.tiny_models import FAMILIES
from tests.devices import DEVICE, PLATFORM
from tests.ranks import run_ranks

SMALL = (
    "data.train_batch_size=16",
    "actor_rollout_ref.actor.ppo_mini_batch_size=8",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_device=8",
    "actor_rollout_ref.rollout.n=4",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_device=32",
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_device=32",
    "critic.ppo_micro_batch_size_per_device=8",
)
# A simulated NPU is slow.
CYCLES = 4 if DEVICE == "npu" else 20
STEPS = 2 if DEVICE == "npu" else 3
HELD_OUT = 8 if DEVICE == "npu" else 32
SECONDS = 560 if DEVICE == "npu" else 280


def arguments(output: Path, *overrides: str) -> list[str]:
    return [f"trainer.default_local_dir={output}", f"data.val_max_samples={HELD_OUT}", *SMALL, *overrides]


def command(output: Path, *overrides: str) -> list[str]:
    return [sys.executable, "-m", "rlhf_npu.main_ppo", *arguments(output, *overrides)]


def run(output: Path, *overrides: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(output, *overrides), capture_output=True, text=True, timeout=SECONDS, cwd=cwd, check=False
    )


def metrics_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def log_of(output: Path) -> str:
    return "\n".join(path.read_text()[-3000:] for path in sorted((output / "logs").glob("*.log")))


def shared_memory() -> set[str]:
    """What is in shared memory, without what tests in pytest-xdist's other processes use, or have left there.

    Their Ray clusters have dashboards, whose semaphores stay when such a cluster is ended; a run's own has none.
    """
    present = {path.name for path in Path("/dev/shm").iterdir()}
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return present
    return {name for name in present if not name.startswith("sem.mp-")} - _shared_memory_of_other_tests()


def _shared_memory_of_other_tests() -> set[str]:
    here = psutil.Process()
    controller = here.parent()
    assert controller is not None
    ours = {here, *here.children(recursive=True)}
    others = set(controller.children(recursive=True)) - ours
    return {segment for process in others for segment in _segments_in_use(process)}


def _segments_in_use(process: psutil.Process) -> set[str]:
    folder = "/dev/shm/"
    try:
        paths = [mapped.path for mapped in process.memory_maps()] + [file.path for file in process.open_files()]
    except psutil.Error:
        return set()  # it has ended
    return {path.removeprefix(folder) for path in paths if path.startswith(folder)}


def assert_nothing_left_in_shared_memory(before: set[str]) -> None:
    deadline = time.monotonic() + (10 if "PYTEST_XDIST_WORKER" in os.environ else 0)
    while not shared_memory() <= before and time.monotonic() < deadline:
        time.sleep(0.2)  # a test in another process makes or removes a segment just now
    assert shared_memory() <= before


@pytest.mark.slow
def test_many_cycles_of_ppo(tmp_path: Path) -> None:
    output = tmp_path / "run"
    before = shared_memory()
    result = run(
        output,
        f"trainer.total_training_steps={CYCLES}",
        f"trainer.test_freq={CYCLES // 2}",
        # One optimizer step on each batch: ppo_kl of every step is then that of unchanged weights.
        "actor_rollout_ref.actor.ppo_mini_batch_size=16",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_device=16",
        "hybrid.plan=offload",
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stdout + result.stderr + log_of(output)
    steps = metrics_of(output)
    assert [step["step"] for step in steps] == list(range(CYCLES + 1))
    assert [step["step"] for step in steps if "val-core/digit_sequence/reward/mean@1" in step] == [
        0,
        CYCLES // 2,
        CYCLES,
    ]
    first, trained = steps[1], steps[1:]
    assert abs(first["actor/ppo_kl"]) < 1e-6
    assert max(step["rollout_corr/logp_diff_max"] for step in trained) < 1e-3
    assert all(step["reshard/version"] == step["step"] for step in trained)
    assert all(step[f"memory/update_actor/{tag}/mapped_gb"] == 0 for step in trained for tag in ("weights", "kv_cache"))
    assert all(step["memory/generate/actor.optimizer/mapped_gb"] == 0 for step in trained)
    assert all(step["memory/generate/kv_cache/mapped_gb"] > 0.1 for step in trained)
    assert all(step["perf/max_memory_used_gb"] >= step["memory/update_actor/peak_gb"] > 0.1 for step in trained)
    assert {"gen", "sleep", "wake_up", "reshard", "update_actor", "update_critic"} <= {
        name.removeprefix("timing_s/") for name in first if name.startswith("timing_s/")
    }
    resident = [step["memory/resident_gb"] for step in trained]  # rises a little until all has been used once
    assert resident[-1] < 1.02 * resident[CYCLES // 2], f"resident memory grows: {resident}"
    _check_output_folder(output)
    assert "trainer and rollout engine compute the same function before training" in result.stdout
    assert "the same function after the reshard of step 1" in result.stdout
    assert "Where the time went" in result.stdout
    assert f"step {CYCLES}/{CYCLES}" in result.stdout
    assert_nothing_left_in_shared_memory(before)


def _check_output_folder(output: Path) -> None:
    assert (output / "config.yaml").stat().st_size > 500
    for picture in ("learning_curve.png", "memory.png"):
        assert (output / picture).read_bytes().startswith(b"\x89PNG")
    assert {"step 1", f"step {CYCLES}", "generate", "update_actor", "reshard"} <= _names_in_trace(output)
    assert list((output / "tensorboard").glob("events.out.tfevents.*"))
    rollouts = [json.loads(line) for path in (output / "rollouts").iterdir() for line in path.open()]
    assert len(rollouts) == CYCLES * 16 * 4
    assert {"prompt", "response", "ground_truth", "score", "step"} <= set(rollouts[0])
    assert not list(output.rglob("*.partial"))
    _check_saved_model(output / "model")


def _names_in_trace(output: Path) -> set[str]:
    return {event["name"] for event in json.loads((output / "trace.json").read_text())["traceEvents"]}


def _check_saved_model(folder: Path) -> None:
    policy = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer("1,3:8,4")["input_ids"]
    with torch.no_grad():
        log_probs = policy(torch.tensor([text])).logits[0].log_softmax(-1)
    expected = [log_probs[place, token].item() for place, token in enumerate(text[1:])]
    ((by_vllm,),) = run_ranks(1, _score_with_vllm, str(folder), text)
    assert by_vllm == pytest.approx(expected, abs=1e-4)


def _score_with_vllm(folder: str, text: list[int]) -> list[list[float]]:
    from rlhf_npu.config import compose_config
    from rlhf_npu.engines.rollout import RolloutEngine

    config = compose_config([f"actor_rollout_ref.model.path={folder}"])
    policy = config.actor_rollout_ref
    return RolloutEngine(policy.model, policy.rollout, config.data, PLATFORM, [2]).score([text])


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        (
            "algorithm.adv_estimator=grpo",
            "actor_rollout_ref.rollout.tensor_model_parallel_size=2",
            "actor_rollout_ref.actor.zero_stage=3",
            "actor_rollout_ref.actor.use_kl_loss=true",
            "actor_rollout_ref.ref.zero_stage=3",
            "actor_rollout_ref.rollout.sleep_level=2",
        ),
        (
            "algorithm.use_kl_in_reward=true",
            "algorithm.kl_ctrl.type=adaptive",
            "actor_rollout_ref.model.dtype=bfloat16",
            "actor_rollout_ref.actor.zero_stage=1",
            "actor_rollout_ref.actor.ppo_epochs=2",
            "actor_rollout_ref.actor.entropy_coeff=0.01",
            "actor_rollout_ref.actor.optim.lr_scheduler_type=cosine",
            "actor_rollout_ref.model.enable_gradient_checkpointing=true",
            "hybrid.share_weights=auto",
            "trainer.critic_warmup=1",
            "trainer.save_freq=1",
        ),
    ],
    ids=["grpo-tp2-zero3-level2", "ppo-kl-bf16-shared"],
)
def test_other_ways_to_run(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    output = tmp_path / "run"
    before = shared_memory()
    result = run(output, f"trainer.total_training_steps={STEPS}", *overrides)
    assert result.returncode == 0, result.stdout + result.stderr + log_of(output)
    steps = metrics_of(output)
    warmup = "trainer.critic_warmup=1" in overrides
    assert steps[-1]["reshard/version"] == STEPS - warmup  # of the actor's weights, which a warm-up leaves alone
    tolerance = 0.2 if "actor_rollout_ref.model.dtype=bfloat16" in overrides else 1e-3
    assert all(step["rollout_corr/logp_diff_max"] < tolerance for step in steps[1:])
    shares = "hybrid.share_weights=auto" in overrides
    assert all((step["reshard/gb"] < 1e-3) == shares for step in steps[1:] if "reshard/gb" in step)
    if "algorithm.use_kl_in_reward=true" in overrides:
        assert abs(steps[1]["actor/reward_kl_penalty"]) < 1e-6
        assert "actor/pg_loss" not in steps[1]
        assert (output / "model_step_1").is_dir()
    assert_nothing_left_in_shared_memory(before)


# Two NPUs do the same in the run that Ctrl-C ends.
AGREEING = ("hybrid.plan=offload", "actor_rollout_ref.rollout.temperature=0.8")


def assert_that_rollout_and_trainer_agree(output: Path) -> None:
    _, *steps = metrics_of(output)
    assert [step["reshard/version"] for step in steps[:STEPS]] == list(range(1, STEPS + 1))
    assert max(step["rollout_corr/logp_diff_max"] for step in steps) < 1e-5
    assert all(step["memory/update_actor/weights/mapped_gb"] == 0 for step in steps)


@pytest.mark.slow
@pytest.mark.skipif(DEVICE != "npu", reason="the other tests are for all devices")
def test_rollout_and_trainer_agree_on_one_npu_with_graphs_that_sleeps_at_level_2(tmp_path: Path) -> None:
    output = tmp_path / "run"
    one = ("trainer.n_devices_per_node=1", f"trainer.total_training_steps={STEPS}")
    ways = ("actor_rollout_ref.rollout.enforce_eager=false", "actor_rollout_ref.rollout.sleep_level=2")
    result = run(output, *AGREEING, *one, *ways)
    assert result.returncode == 0, result.stdout + result.stderr + log_of(output)
    assert_that_rollout_and_trainer_agree(output)


def test_a_folder_that_holds_a_run_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    result = run(tmp_path)
    assert result.returncode == 2
    assert f"trainer.default_local_dir={tmp_path}" in "".join(result.stderr.split("\n"))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


# It passes the trial before the start, and then exits in a worker.
BROKEN_REWARD = """
import sys

def crash(response, finished, sample):
    return 1.0 if response in ("", sample.ground_truth) else sys.exit("no such answer")
"""


@pytest.mark.slow
def test_a_reward_function_that_exits_at_some_response_ends_the_run_and_says_why(tmp_path: Path) -> None:
    (tmp_path / "rewards.py").write_text(BROKEN_REWARD)
    overrides = ("reward.function=rewards.py:crash", "trainer.val_before_train=false")
    result = run(tmp_path / "run", *overrides, cwd=tmp_path)
    assert result.returncode == 2
    assert "raised SystemExit: no such answer" in result.stderr
    assert "on prompt " in result.stderr
    assert "digit_sequence" in result.stderr
    assert "Traceback" not in result.stderr


def _gemma(tmp_path: Path) -> tuple[str, ...]:
    """A run of a model that caps its attention scores, with attention that does not."""
    folder = FAMILIES["Gemma 2"].save(tmp_path / "model")
    return (
        f"actor_rollout_ref.model.path={folder}",
        "actor_rollout_ref.model.attn_implementation=sdpa",
        "algorithm.adv_estimator=grpo",
        "trainer.total_training_steps=1",
        "trainer.n_devices_per_node=1",
        "trainer.val_before_train=false",
        "data.val_files=[]",
    )


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["error", "warn"])
def test_engines_that_compute_different_functions_end_the_run_before_it_trains(tmp_path: Path, choice: str) -> None:
    result = run(tmp_path / "run", *_gemma(tmp_path), f"trainer.on_engine_mismatch={choice}")
    said = result.stderr if choice == "error" else result.stdout
    assert result.returncode == (2 if choice == "error" else 0), result.stdout + result.stderr
    assert "trainer and rollout engine compute different functions before training" in said
    assert "The trainer's attention is sdpa, the rollout engine's CPU_ATTN" in said
    assert "set actor_rollout_ref.model.attn_implementation=eager" in said
    assert "Traceback" not in result.stderr
    if choice == "error":
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["logs"]
    else:
        assert [step["step"] for step in metrics_of(tmp_path / "run")] == [1]


SIXTEEN_DEVICES = (
    "actor_rollout_ref.actor.ppo_mini_batch_size=16",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_device=4",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_device=4",
    "critic.ppo_micro_batch_size_per_device=4",
)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("actor_rollout_ref.model.path=/nowhere/model", ["/nowhere/model", "does not exist"]),
        ("data.train_files=[/nowhere/train.jsonl]", ["/nowhere/train.jsonl"]),
        ("trainer.n_devices_per_node=16", ["trainer.n_devices_per_node=16", "CPU cores"]),
        ("trainer.device=npu", ["trainer.device=npu"]),
        (
            "actor_rollout_ref.rollout.tensor_model_parallel_size=3",
            ["tensor_model_parallel_size=3", "divide"],
        ),
        ("data.train_batch_size=1008", ["data.train_batch_size=1008", "prompts"]),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    override: str,
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["main_ppo", *arguments(tmp_path / "run", *SIXTEEN_DEVICES, override)])
    with pytest.raises(SystemExit) as end:
        main_ppo.main()
    printed = capfd.readouterr()
    assert end.value.code == 2, printed.out + printed.err
    for word in words:
        assert word in " ".join(printed.err.split())
    assert "Traceback" not in printed.err
    assert list(tmp_path.iterdir()) == []


# A terminal's Ctrl-C reaches every process, and so does the SIGTERM of `timeout` and of cluster schedulers, which ends
# Ray's own processes at the same time; a plain `kill` reaches one.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("send", "stop"),
    [(os.killpg, signal.SIGINT), (os.killpg, signal.SIGTERM), (os.kill, signal.SIGTERM)],
    ids=["ctrl_c", "timeout", "kill"],
)
def test_a_signal_ends_the_run_and_leaves_nothing_behind(
    tmp_path: Path, send: Callable[[int, int], None], stop: signal.Signals
) -> None:
    output = tmp_path / "run"
    before = shared_memory()
    zero3 = ("actor_rollout_ref.actor.zero_stage=3", "critic.zero_stage=3", *AGREEING) if DEVICE == "npu" else ()
    process = subprocess.Popen(
        command(
            output,
            "actor_rollout_ref.rollout.tensor_model_parallel_size=2",
            "trainer.total_training_steps=500",
            *zero3,
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    _wait_for_steps(output, process, STEPS)
    family = psutil.Process(process.pid).children(recursive=True)
    send(process.pid, stop)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert "interrupted" in printed
    _, alive = psutil.wait_procs(family, timeout=15)
    assert alive == []
    assert_nothing_left_in_shared_memory(before)
    assert not list(output.rglob("*.partial"))
    assert len(metrics_of(output)) >= STEPS
    assert {"step 1", f"step {STEPS}"} <= _names_in_trace(output)
    if zero3:
        assert_that_rollout_and_trainer_agree(output)


def _wait_for_steps(output: Path, process: subprocess.Popen[str], steps: int) -> None:
    deadline = time.monotonic() + 0.7 * SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stdout and process.stdout.read()
        if (output / "metrics.jsonl").exists() and len(metrics_of(output)) > steps:
            return
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGTERM)  # it would go on beside all tests that follow
    raise AssertionError(f"no {steps} steps in time: {log_of(output)}")
