"""Which Ray cluster a run uses, whatever the machine's state: its own, or the one that RAY_ADDRESS names."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from rlhf_npu.errors import ClusterError
from rlhf_npu.trainer import ray_session
from rlhf_npu.trainer.ray_session import ADDRESS, check_cluster, cluster_address

OWN_CLUSTER = """
import ray
from rlhf_npu.config import compose_config
from rlhf_npu.errors import ClusterError
from rlhf_npu.trainer.ray_session import ray_session

try:
    with ray_session(compose_config()):
        print("session", ray.get_runtime_context().gcs_address)
except ClusterError as error:
    print("error", error)
"""


def own_cluster(**environment: str) -> str:
    variables = {name: value for name, value in os.environ.items() if name != ADDRESS} | environment
    command = [sys.executable, "-c", OWN_CLUSTER]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.parametrize("value", ["", "local", " "])
def test_without_an_address_a_run_has_a_cluster_of_its_own(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(ADDRESS, value)
    assert cluster_address() is None
    check_cluster()


def test_an_address_where_no_ray_answers_is_refused_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_session, "ANSWER_SECONDS", 1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        closed = f"127.0.0.1:{silent.getsockname()[1]}"
        start = time.monotonic()
        for address, words in (
            ("nonsense", "is not host:port"),
            ("10.0.0.1:", "is not host:port"),
            ("10.0.0.1:99999", "is not host:port"),
            ("http://127.0.0.1:8265", "ray job submit"),
            ("ray://127.0.0.1:10001", "ray job submit"),
            (closed, "no Ray cluster there"),
            ("no.such.host.invalid:6379", "no Ray cluster there"),
        ):
            monkeypatch.setenv(ADDRESS, address)
            with pytest.raises(ClusterError, match=words) as refused:
                check_cluster()
            assert f"{ADDRESS}={address}" in str(refused.value)
        silent.listen()
        monkeypatch.setenv(ADDRESS, closed)
        with pytest.raises(ClusterError, match="what listens there is no Ray cluster"):
            check_cluster()
    assert time.monotonic() - start < 30


def test_a_run_shares_nothing_with_what_is_left_of_another_cluster() -> None:
    with socket.socket() as taken, TemporaryDirectory(dir="/tmp") as folder:  # a short path, for Ray's sockets
        (Path(folder) / "ray").mkdir()
        (Path(folder) / "ray" / "ray_current_cluster").write_text("127.0.0.1:6399")
        taken.bind(("", 0))
        taken.listen()
        printed = own_cluster(
            RAY_TMPDIR=folder,
            RAY_REDIS_ADDRESS="127.0.0.1:6398",
            RAY_GCS_SERVER_PORT=str(taken.getsockname()[1]),
            http_proxy="http://127.0.0.1:1",
            https_proxy="http://127.0.0.1:1",
        )
    assert printed.startswith("session ")
    assert ":6399" not in printed


@pytest.mark.parametrize(("kind", "words"), [("file", "Not a directory"), ("x" * 100, "set RAY_TMPDIR to a short")])
def test_what_ray_raises_at_its_start_is_one_line(tmp_path: Path, kind: str, words: str) -> None:
    folder = tmp_path / kind
    folder.touch() if kind == "file" else folder.mkdir()
    printed = own_cluster(RAY_TMPDIR=str(folder))
    assert printed.startswith("error starting Ray on this machine: ")
    assert words in printed
    assert len(printed.splitlines()) == 1
