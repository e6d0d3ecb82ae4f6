"""The driver's handle on all workers: one Ray actor a device, in one placement group."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from rlhf_npu.config import RootConfig
from rlhf_npu.data.prompts import PromptSample
from rlhf_npu.errors import DeviceError, RlhfNpuError, WorkerError
from rlhf_npu.garbage import search_as_usual
from rlhf_npu.interrupts import raise_if_interrupted
from rlhf_npu.platform import Platform
from rlhf_npu.workers.deaths import cause_of_death
from rlhf_npu.workers.environment import Rank, static_environment, worker_log
from rlhf_npu.workers.shared_memory import end_run, shared_memory_of
from rlhf_npu.workers.worker_process import WorkerProcess

CLOSE_SECONDS = 10
POLL_SECONDS = 1
RESERVE_SECONDS = 60


class WorkerGroup:
    """All ranks as one. A call goes to every rank; the first that fails ends it, the others are not waited for.

    Use as a context manager: leaving it stops every worker and removes what it left in shared memory.
    """

    def __init__(
        self,
        kind: type[WorkerProcess],
        config: RootConfig,
        platform: Platform,
        run_id: str,
        output: Path,
        tensor_parallel: int = 1,
    ) -> None:
        """Start nothing yet.

        Args:
            kind: of the workers; built with `config` and its place.
            tensor_parallel: ranks that are dealt the same prompts.
        """
        self._kind = kind
        self._config = config
        self._platform = platform
        self._run_id = run_id
        self._output = output
        self._tensor_parallel = tensor_parallel
        self._group: PlacementGroup | None = None
        self._actors: list[Any] = []
        self._other_nodes: set[str] = set()
        self._shared_memory = ExitStack()

    @property
    def world_size(self) -> int:
        """Devices, and workers, in all."""
        return self._config.trainer.world_size

    def __enter__(self) -> WorkerGroup:
        try:
            self._shared_memory.enter_context(shared_memory_of(self._run_id))
            self._group = self._reserve_devices()
            for rank in range(self.world_size):
                self._actors.append(self._create_actor(rank))
        except BaseException:
            self.close(graceful=False)
            raise
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *_: object) -> None:
        self.close(graceful=exception_type is None)

    def start(self, *args: Any) -> list[Any]:
        """Let all ranks meet and build what they run, by their `start`; results by rank."""
        address, port = self._results([self._actors[0].call.remote("address")])[0]
        self.call("join", address, port, self._config.trainer.seed)
        started = self.call("start", *args)
        self.call("settle")
        search_as_usual()
        return started

    def call(self, method: str, *args: Any) -> list[Any]:
        """Call `method` with the same arguments on every rank; results by rank.

        Raises:
            RlhfNpuError: what a rank raised.
            WorkerError: a rank died, or raised something else; names the rank and its log.
        """
        return self._results([actor.call.remote(method, *args) for actor in self._actors])

    def call_each(self, method: str, arguments: Sequence[Any]) -> list[Any]:
        """Call `method` on every rank, each with its own of `arguments`; results and errors as those of `call`."""
        return self._results(
            [actor.call.remote(method, own) for actor, own in zip(self._actors, arguments, strict=True)]
        )

    def call_with_prompts(self, method: str, prompts: Sequence[PromptSample], *args: Any) -> list[Any]:
        """Deal `prompts` out to the ranks in turn and call `method`; each rank sees its replica's prompts."""
        shards = [list(prompts[rank :: self.world_size]) for rank in range(self.world_size)]
        size = self._tensor_parallel
        replicas = [shards[rank - rank % size :][:size] for rank in range(self.world_size)]
        calls = zip(self._actors, replicas, strict=True)
        return self._results([actor.call.remote(method, replica, *args) for actor, replica in calls])

    def close(self, graceful: bool) -> None:
        """Stop all workers, at once unless `graceful`, and remove what they left in shared memory.

        Nothing here asks Ray's control plane: that would wait for a minute if a signal to the whole process group has
        ended Ray as well. The placement group goes when the driver leaves Ray.
        """
        if graceful:
            closing = [actor.call.remote("close") for actor in self._actors]
            ray.wait(closing, num_returns=len(closing), timeout=CLOSE_SECONDS)
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []
        self._shared_memory.close()
        self._end_on_other_nodes()

    def _reserve_devices(self) -> PlacementGroup:
        trainer, resource = self._config.trainer, self._platform.ray_resource
        nodes = [node["Resources"].get(resource, 0) for node in ray.nodes() if node["Alive"]]
        fitting = sum(count >= trainer.n_devices_per_node for count in nodes)
        if fitting < trainer.nnodes:
            raise DeviceError(
                f"trainer.nnodes={trainer.nnodes} with trainer.n_devices_per_node={trainer.n_devices_per_node} asks "
                f"for {self.world_size} x {resource}; Ray's nodes have {[int(count) for count in nodes]}; "
                "lower one of the two, or add nodes"
            )
        # One bundle a node: the devices of a node, and so a tensor-parallel group, are never spread over several.
        devices = float(trainer.n_devices_per_node)
        bundles = [{resource: devices, "CPU": devices} for _ in range(trainer.nnodes)]
        group = placement_group(bundles, strategy="STRICT_SPREAD")
        if not group.wait(timeout_seconds=RESERVE_SECONDS):
            remove_placement_group(group)
            raise DeviceError(
                f"Ray could not reserve {trainer.n_devices_per_node} x {resource} on each of {trainer.nnodes} nodes "
                f"within {RESERVE_SECONDS} s; `ray status` shows who holds them"
            )
        nodes = placement_group_table(group)["bundles_to_node_id"].values()
        self._other_nodes = set(nodes) - {ray.get_runtime_context().get_node_id()}
        return group

    def _create_actor(self, rank: int) -> Any:
        place = Rank.of(rank, self.world_size, self._config.trainer.n_devices_per_node)
        resource = self._platform.ray_resource
        actor = ray.remote(self._kind).options(
            name=f"{self._run_id}/rank_{rank}",  # what `ray list actors` and the dashboard show
            num_cpus=1 if resource == "CPU" else 0,
            num_gpus=1 if resource == "GPU" else 0,
            resources={} if resource in ("CPU", "GPU") else {resource: 1},
            runtime_env={"env_vars": static_environment(place, self._platform, self._run_id)},
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, place.node),
        )
        driver = ray.get_runtime_context().get_node_id()
        return actor.remote(self._config, place, self._platform.name, str(self._output), driver)

    def _end_on_other_nodes(self) -> None:
        """Clean up where this process cannot. Should Ray itself have ended, the next run there will do it."""
        task = ray.remote(num_cpus=0)(end_run)
        with suppress(RayError):
            ending = [
                task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(self._run_id)
                for node in self._other_nodes
            ]
            if ending:
                ray.wait(ending, num_returns=len(ending), timeout=CLOSE_SECONDS)
        self._other_nodes = set()

    def _results(self, calls: list[Any]) -> list[Any]:
        # In order of completion: a rank that failed leaves the others waiting for it in a collective.
        pending = list(calls)
        while pending:
            raise_if_interrupted()
            done, pending = ray.wait(pending, num_returns=1, timeout=POLL_SECONDS)
            for call in done:
                self._result(call, calls.index(call))
        return ray.get(calls)

    def _result(self, call: Any, rank: int) -> Any:
        log = worker_log(self._output, rank)
        try:
            return ray.get(call)
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            if isinstance(cause, RlhfNpuError):
                raise cause from error
            raise WorkerError(f"rank {rank}: {type(cause).__name__}: {cause}; its log is {log}") from error
        except RayError as error:
            raise_if_interrupted()  # a signal to all processes has ended the worker first
            raise WorkerError(f"rank {rank} died: {cause_of_death(error)}; its log is {log}") from error
