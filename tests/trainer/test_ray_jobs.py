"""Runs as Ray jobs, against a real head with its job server: on one node, on two, and stopped."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest
from ray.job_submission import JobStatus, JobSubmissionClient

from rlhf_npu.workers.environment import free_port

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "scripts" / "submit_job.py"
RAY = (sys.executable, "-m", "ray.scripts.scripts")
MARK = "RLHF_NPU_TEST_FOLDER"  # in the environment of all processes that a test starts
SHARED_MEMORY = Path("/dev/shm")
SMALL = (
    "algorithm.adv_estimator=grpo",
    "data.train_batch_size=8",
    "actor_rollout_ref.actor.ppo_mini_batch_size=8",
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_device=8",
    "actor_rollout_ref.rollout.n=4",
    "actor_rollout_ref.rollout.kv_cache_memory_gb=0.1",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_device=8",
    "trainer.val_before_train=false",
    "trainer.logger=[console,jsonl]",
)


def until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"within {seconds} s not: {what}"
        time.sleep(0.2)


def steps(output: Path) -> list[dict[str, float]]:
    file = output / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_the_script_runs_a_job_on_a_cluster_of_its_own_and_takes_it_down(tmp_path: Path) -> None:
    job = start_script(
        tmp_path, "trainer.n_devices_per_node=1", "trainer.total_training_steps=1", "trainer.test_freq=0"
    )
    printed, _ = job.communicate(timeout=280)
    assert job.returncode == 0, printed
    assert "step 1/1" in printed
    assert "SUCCEEDED" in printed
    (folder,) = (tmp_path / "outputs").glob("*/*")
    assert (folder / "model" / "config.json").exists()
    assert_nothing_runs_in(tmp_path)


def test_ctrl_c_in_the_script_stops_the_job_and_takes_the_cluster_down(tmp_path: Path) -> None:
    job = start_script(tmp_path)
    assert job.stdout is not None
    for line in job.stdout:
        if line.startswith("starting 2 workers"):
            break
    os.killpg(job.pid, signal.SIGINT)
    printed, _ = job.communicate(timeout=120)
    assert job.returncode == 130, printed
    assert "interrupted; all workers have stopped" in printed
    assert "Traceback" not in printed
    assert_nothing_runs_in(tmp_path)


def start_script(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *SMALL, *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        start_new_session=True,
        env=os.environ | {MARK: str(folder)},
    )


def assert_nothing_runs_in(folder: Path) -> None:
    until(lambda: not processes_of(folder), 60, f"the end of {processes_of(folder)}")


def processes_of(folder: Path) -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if _mark(process) == str(folder)]


def _mark(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(MARK) if process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:
        return None


@pytest.fixture
def two_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[JobSubmissionClient]:
    """Two nodes of three CPUs each on this machine: four workers fit on them as 3 + 1 as well."""
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64, "RAY_JOB_STOP_WAIT_TIME_S": "60"}
    for name, value in (environment | {MARK: str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    head, dashboard = free_port(), free_port()
    with TemporaryDirectory(dir="/tmp") as folder, (tmp_path / "ray.log").open("w") as log:
        start = [*RAY, "start", "--block", "--num-cpus=3", "--disable-usage-stats"]
        of_head = ["--head", f"--port={head}", f"--dashboard-port={dashboard}", f"--temp-dir={folder}"]
        of_head.append(f"--ray-client-server-port={free_port()}")
        for options in (of_head, [f"--address=127.0.0.1:{head}"]):
            command = [*start, *options, f"--dashboard-agent-listen-port={free_port()}"]
            subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path, start_new_session=True)
            time.sleep(1)
        try:
            address = f"http://127.0.0.1:{dashboard}"
            until(lambda: len(ray_list("nodes", address, "state=ALIVE")) == 2, 60, "two nodes")
            # Ray reads the mode once in a process, which other tests have done here.
            yield JobSubmissionClient(address, headers={"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"})
        finally:
            processes = processes_of(tmp_path)
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    process.terminate()
            for process in psutil.wait_procs(processes, timeout=3)[1]:
                process.kill()
            assert_nothing_runs_in(tmp_path)


def ray_list(what: str, address: str, condition: str) -> list[dict[str, str]]:
    command = [*RAY, "list", what, f"--address={address}", "--format=json", f"--filter={condition}"]
    printed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return json.loads(printed) if printed.startswith("[") else []


def test_a_job_over_two_nodes_keeps_tensor_parallel_groups_together_and_its_stop_is_orderly(
    two_nodes: JobSubmissionClient, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    overrides = (
        f"trainer.default_local_dir={output}",
        "trainer.nnodes=2",
        "trainer.n_devices_per_node=2",
        "actor_rollout_ref.rollout.tensor_model_parallel_size=2",
        "trainer.total_training_steps=500",
    )
    job = two_nodes.submit_job(entrypoint=shlex.join([sys.executable, "-m", "rlhf_npu.main_ppo", *SMALL, *overrides]))
    until(lambda: len(steps(output)) >= 2 or ended(two_nodes, job), 250, "two steps")
    assert len(steps(output)) >= 2, two_nodes.get_job_logs(job)
    assert max(step["rollout_corr/logp_diff_max"] for step in steps(output)) < 1e-3
    actors = ray_list("actors", two_nodes.get_address(), "class_name=HybridWorker")
    node_of = {int(actor["name"].rpartition("_")[2]): actor["node_id"] for actor in actors}
    assert node_of[0] == node_of[1] != node_of[2] == node_of[3]
    (run_id,) = {actor["name"].partition("/")[0] for actor in actors}

    two_nodes.stop_job(job)
    until(lambda: ended(two_nodes, job), 60, "the end of the job")
    assert two_nodes.get_job_status(job) == JobStatus.STOPPED
    printed = two_nodes.get_job_logs(job)
    assert f"interrupted; all workers have stopped; results so far are in {output}" in printed
    assert "Traceback" not in printed
    assert not list(SHARED_MEMORY.glob(f"*{run_id}*"))
    assert not list(output.rglob("*.partial"))


def ended(client: JobSubmissionClient, job: str) -> bool:
    return client.get_job_status(job).is_terminal()
