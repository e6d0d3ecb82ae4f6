"""The Ray cluster of a run: the one that RAY_ADDRESS names, or one of its own on this machine."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import psutil
import ray
from ray.exceptions import AuthenticationError, RayError

from rlhf_npu.config import RootConfig
from rlhf_npu.edges import causes, one_line
from rlhf_npu.errors import ClusterError
from rlhf_npu.interrupts import raise_if_interrupted, raise_once
from rlhf_npu.platform import PLATFORMS

ADDRESS = "RAY_ADDRESS"
ANSWER_SECONDS = 5
TOO_LONG = "AF_UNIX path length"  # of the sockets in Ray's temporary folder
# They would make a run's own cluster share the store, or the port, of another one.
OF_ANOTHER_CLUSTER = ("RAY_REDIS_ADDRESS", "RAY_GCS_SERVER_PORT")


def cluster_address() -> str | None:
    """What RAY_ADDRESS says, for example "10.0.0.1:6379" or "auto"; None where the run has a cluster of its own."""
    address = os.environ.get(ADDRESS, "").strip()
    return None if address in ("", "local") else address


def check_cluster() -> None:
    """Find out whether a driver can join the cluster that RAY_ADDRESS names; takes no longer than some seconds.

    Raises:
        ClusterError: RAY_ADDRESS is malformed, nothing answers there, or this machine is not a node of a cluster.
    """
    address = cluster_address()
    if address is None:
        return
    if "://" in address:
        raise ClusterError(
            f"{ADDRESS}={address}: a run must be started inside the cluster; submit it with `ray job submit` "
            f"(docs/ray_jobs.md), or set {ADDRESS} to host:port of the cluster's head on one of its nodes"
        )
    if address != "auto":
        _check_that_ray_answers(address)
    if not any(process.info["name"] == "raylet" for process in psutil.process_iter(["name"])):
        raise ClusterError(
            f"{ADDRESS}={address}: no Ray node runs on this machine, and a driver needs one beside it; join the "
            "cluster with `ray start --address=...`, submit the run with `ray job submit`, or unset it for a "
            "cluster of its own"
        )


@contextmanager
def ray_session(config: RootConfig) -> Iterator[None]:
    """Join or start the cluster; on leaving, a cluster of one's own ends.

    Raises:
        ClusterError: what Ray says, in a line.
    """
    try:
        _start(config)
        raise_once()  # ray.init sets a handler of its own
        raise_if_interrupted()
        yield
    except RayError as error:
        raise_if_interrupted()
        raise ClusterError(f"Ray failed: {_reason(error)}") from error
    finally:
        ray.shutdown()
        raise_once()  # ray.shutdown takes it away


def _start(config: RootConfig) -> None:
    address = cluster_address()
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "critical"}
    if address is None:
        cpus = max(PLATFORMS["cpu"].count(), config.trainer.n_devices_per_node)
        options |= {"num_cpus": cpus, "include_dashboard": False}
        for name in OF_ANOTHER_CLUSTER:
            os.environ.pop(name, None)
    _keep_daemons_quiet()
    try:
        ray.init(address or "local", **options)
    except SystemExit as end:  # that handler's answer to a signal
        raise KeyboardInterrupt from end
    except Exception as error:  # Ray raises whatever its parts raise, plain Exception too
        raise_if_interrupted()  # a signal to all processes has ended Ray's first
        where = f"{ADDRESS}={address}" if address else "starting Ray on this machine"
        raise ClusterError(f"{where}: {_reason(error)}") from error


def _keep_daemons_quiet() -> None:
    """Leave what Ray's daemons say about dead workers, and each other, to Ray's log: our errors tell of the former."""
    ray._private.worker.print_to_stdstream = lambda *_, **__: None  # noqa: SLF001  # log_to_driver is not for these


def _check_that_ray_answers(address: str) -> None:
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ClusterError(f"{ADDRESS}={address}: is not host:port, for example 10.0.0.1:6379")
    elsewhere = f"start one there, or unset {ADDRESS} for a cluster of the run's own"
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS).close()
    except OSError as error:
        raise ClusterError(f"{ADDRESS}={address}: no Ray cluster there ({error}); {elsewhere}") from error
    with grpc.insecure_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=ANSWER_SECONDS)
        except grpc.FutureTimeoutError as error:
            raise ClusterError(f"{ADDRESS}={address}: what listens there is no Ray cluster; {elsewhere}") from error


def _reason(error: BaseException) -> str:
    """What Ray says, in a line, with what would be right where Ray does not say it."""
    text = one_line(error)
    if TOO_LONG in str(error):
        return f"{text}; set RAY_TMPDIR to a short path"
    if any(isinstance(cause, AuthenticationError) for cause in causes(error)):
        return f"{text}: the cluster asks for a token; set RAY_AUTH_MODE=token, and see docs/ray_jobs.md for the token"
    return text
