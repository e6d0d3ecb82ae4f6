"""The driver's handle on all workers: one Ray actor a device, in one placement group."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlhf_npu.config import PPOConfig
from rlhf_npu.data.prompts import PromptSample
from rlhf_npu.errors import DeviceError, RlhfNpuError, WorkerError
from rlhf_npu.platform import Platform
from rlhf_npu.workers.environment import Rank, static_environment
from rlhf_npu.workers.hybrid_worker import HybridWorker
from rlhf_npu.workers.shared_memory import WorkerProcess, remove_segments, segments_of

CLOSE_SECONDS = 10


class WorkerGroup:
    """All ranks as one. A call goes to every rank; the first that fails ends it, the others are not waited for.

    Use as a context manager: leaving it stops every worker and removes what it left in shared memory.
    """

    def __init__(self, config: PPOConfig, platform: Platform, run_id: str, output: Path) -> None:
        self._config = config
        self._platform = platform
        self._run_id = run_id
        self._output = output
        self._tensor_parallel = config.actor_rollout_ref.rollout.tensor_model_parallel_size
        self._group: PlacementGroup | None = None
        self._actors: list[Any] = []
        self._processes: list[WorkerProcess] = []

    @property
    def world_size(self) -> int:
        """Devices, and workers, in all."""
        return self._config.trainer.world_size

    def __enter__(self) -> WorkerGroup:
        self._group = self._reserve_devices()
        self._actors = [self._create_actor(rank) for rank in range(self.world_size)]
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *_: object) -> None:
        self.close(graceful=exception_type is None)

    def start(self, optimizer_steps: tuple[int, int]) -> None:
        """Build the engines on every rank."""
        self._processes = self.call("process")
        address, port = self._results([self._actors[0].address.remote()])[0]
        self.call("start", address, port, optimizer_steps)

    def call(self, method: str, *args: Any) -> list[Any]:
        """Call `method` with the same arguments on every rank; results by rank.

        Raises:
            RlhfNpuError: what a rank raised.
            WorkerError: a rank died, or raised something else; names the rank and its log.
        """
        return self._results([getattr(actor, method).remote(*args) for actor in self._actors])

    def call_with_prompts(self, method: str, prompts: Sequence[PromptSample], *args: Any) -> list[Any]:
        """Deal `prompts` out to the ranks in turn and call `method`; each rank sees its replica's prompts."""
        shards = [list(prompts[rank :: self.world_size]) for rank in range(self.world_size)]
        size = self._tensor_parallel
        replicas = [shards[rank - rank % size :][:size] for rank in range(self.world_size)]
        calls = zip(self._actors, replicas, strict=True)
        return self._results([getattr(actor, method).remote(replica, *args) for actor, replica in calls])

    def close(self, graceful: bool) -> None:
        """Stop all workers, at once unless `graceful`, and remove what they left in shared memory.

        Their placement group goes when the driver leaves Ray: to ask for its removal would wait for a minute if a
        signal to the whole process group has ended Ray as well.
        """
        if graceful:
            closing = [actor.close.remote() for actor in self._actors]
            ray.wait(closing, num_returns=len(closing), timeout=CLOSE_SECONDS)
        segments = segments_of(self._processes)
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []
        remove_segments(self._run_id, segments)

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
        bundle = {resource: 1.0} if resource == "CPU" else {resource: 1.0, "CPU": 1.0}
        group = placement_group([bundle] * self.world_size, strategy="PACK")
        if not group.wait(timeout_seconds=60):
            remove_placement_group(group)
            raise DeviceError(
                f"Ray could not reserve {self.world_size} x {resource} within 60 s; `ray status` shows who holds them"
            )
        return group

    def _create_actor(self, rank: int) -> Any:
        per_node = self._config.trainer.n_devices_per_node
        place = Rank(rank, self.world_size, rank % per_node, per_node)
        resource = self._platform.ray_resource
        actor = ray.remote(HybridWorker).options(
            num_cpus=1 if resource == "CPU" else 0,
            num_gpus=1 if resource == "GPU" else 0,
            resources={} if resource in ("CPU", "GPU") else {resource: 1},
            runtime_env={"env_vars": static_environment(place, self._platform, self._run_id)},
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, rank),
        )
        return actor.remote(self._config, place, self._platform.name, str(self._output))

    def _results(self, calls: list[Any]) -> list[Any]:
        # In order of completion: a rank that failed leaves the others waiting for it in a collective.
        pending = list(calls)
        while pending:
            done, pending = ray.wait(pending, num_returns=1)
            self._result(done[0], calls.index(done[0]))
        return ray.get(calls)

    def _result(self, call: Any, rank: int) -> Any:
        log = self._output / "logs" / f"worker_{rank}.log"
        try:
            return ray.get(call)
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            if isinstance(cause, RlhfNpuError):
                raise cause from error
            raise WorkerError(f"rank {rank}: {type(cause).__name__}: {cause}; its log is {log}") from error
        except RayActorError as error:
            raise WorkerError(f"rank {rank} died: {error}; its log is {log}") from error
