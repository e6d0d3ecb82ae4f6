"""Start a small Ray cluster on this machine, run rlhf_npu on it as a job, and take the cluster down.

    python scripts/submit_job.py trainer.total_training_steps=5

The arguments are main_ppo's. The cluster has a temporary folder, ports and a token of its own, so that it disturbs no
other Ray here. Ctrl-C stops the job as `ray job stop` does. The exit status is the run's.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from rlhf_npu.interrupts import INTERRUPTED, interruptible
from rlhf_npu.workers.environment import free_port

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

START_SECONDS = 120
END_SECONDS = 60
STOP_SECONDS = 60  # for the run's orderly end; Ray's own default is 3
OF_ANOTHER_CLUSTER = ("RAY_ADDRESS", "RAY_REDIS_ADDRESS", "RAY_GCS_SERVER_PORT", "RAY_AUTH_TOKEN_PATH")


def main() -> int:
    """The exit status of the run."""
    for name in OF_ANOTHER_CLUSTER:
        os.environ.pop(name, None)
    os.environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS),
    }
    try:
        with interruptible(), small_cluster() as server:
            return run_job(server, sys.argv[1:])
    except KeyboardInterrupt:
        return INTERRUPTED


@contextmanager
def small_cluster() -> Iterator[str]:
    """A head node on this machine; yields the address of its job server."""
    folder, dashboard = tempfile.mkdtemp(prefix="rlhf_npu_ray_"), free_port()
    # Those that Ray does not choose by itself: with another Ray's, the agent would not start, and take no job.
    names = ("port", "ray-client-server-port", "dashboard-agent-listen-port")
    ports = {"dashboard-port": dashboard, **{name: free_port() for name in names}}
    command = [*ray_command("start", "--head", "--block", "--disable-usage-stats", f"--temp-dir={folder}")]
    command += [f"--{name}={port}" for name, port in ports.items()]
    log = Path(folder) / "start.log"
    print(f"starting a Ray cluster: {shlex.join(command[2:])}", flush=True)
    with log.open("w") as file:
        # In a session of its own: a terminal's Ctrl-C is for this script, which ends things in their order.
        head = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    try:
        yield f"http://127.0.0.1:{dashboard}"
        if head.poll() is not None:
            raise SystemExit(f"the Ray cluster ended by itself: {log.read_text()[-2000:]}")
    finally:
        end(head)
        shutil.rmtree(folder, ignore_errors=True)


def run_job(server: str, overrides: list[str]) -> int:
    """Submit main_ppo, print its log as it grows, and return its exit status; a signal stops it first."""
    client, job = submit(server, shlex.join([sys.executable, "-m", "rlhf_npu.main_ppo", *overrides]))
    print(f"submitted {job} to {server}", flush=True)
    try:
        asyncio.run(follow(client, job))
    except KeyboardInterrupt:
        client.stop_job(job)
        asyncio.run(follow(client, job, beginning_with="interrupted"))
        raise
    return wait_for_end(client, job)


def submit(server: str, entrypoint: str) -> tuple[JobSubmissionClient, str]:
    """A client of the job server, and the job's id, as soon as the server takes jobs."""
    from ray.job_submission import JobSubmissionClient

    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            client = JobSubmissionClient(server)
            return client, client.submit_job(entrypoint=entrypoint)
        except (ConnectionError, RuntimeError) as error:  # no server yet; no agent yet
            if time.monotonic() > deadline:
                raise SystemExit(f"{server} takes no jobs within {START_SECONDS} s: {error}") from error
            time.sleep(0.5)


async def follow(client: JobSubmissionClient, job: str, beginning_with: str = "") -> None:
    """Print the job's log until the job ends, from the first line that begins so."""
    printing = not beginning_with
    async for text in client.tail_job_logs(job):
        for line in text.splitlines(keepends=True):
            printing = printing or line.startswith(beginning_with)
            if printing:
                print(line, end="", flush=True)


def wait_for_end(client: JobSubmissionClient, job: str) -> int:
    """The exit status of a job whose log has ended."""
    deadline = time.monotonic() + END_SECONDS
    while not client.get_job_status(job).is_terminal() and time.monotonic() < deadline:
        time.sleep(0.2)
    info = client.get_job_info(job)
    print(f"{job}: {info.status.value}", flush=True)
    return 1 if info.driver_exit_code is None else info.driver_exit_code


def end(head: subprocess.Popen[bytes]) -> None:
    """End the cluster's processes, and those that do not end by themselves."""
    try:
        processes = psutil.Process(head.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    head.terminate()
    _, alive = psutil.wait_procs(processes, timeout=END_SECONDS)
    for process in alive:
        process.kill()
    head.wait(timeout=END_SECONDS)


def ray_command(*arguments: str) -> list[str]:
    """Ray's command line, of this very Python."""
    return [sys.executable, "-m", "ray.scripts.scripts", *arguments]


if __name__ == "__main__":
    sys.exit(main())
