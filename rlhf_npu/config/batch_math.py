"""How one step's batch is cut: prompts, sequences, mini-batches, micro-batches, optimizer steps."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from rlhf_npu.config.keys import Problem

TRAIN_BATCH = "data.train_batch_size"
MINI_BATCH = "actor_rollout_ref.actor.ppo_mini_batch_size"
ACTOR_MICRO = "actor_rollout_ref.actor.ppo_micro_batch_size_per_device"
CRITIC_MICRO = "critic.ppo_micro_batch_size_per_device"
OLD_LOG_PROB_MICRO = "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_device"
REF_LOG_PROB_MICRO = "actor_rollout_ref.ref.log_prob_micro_batch_size_per_device"
TENSOR_PARALLEL = "actor_rollout_ref.rollout.tensor_model_parallel_size"
LARGEST_BATCH = 1 << 24
KEYS_OF_A_BATCH = frozenset(
    {
        TRAIN_BATCH,
        MINI_BATCH,
        ACTOR_MICRO,
        CRITIC_MICRO,
        OLD_LOG_PROB_MICRO,
        REF_LOG_PROB_MICRO,
        TENSOR_PARALLEL,
        "actor_rollout_ref.rollout.n",
        "actor_rollout_ref.actor.ppo_epochs",
        "critic.ppo_epochs",
        "trainer.nnodes",
        "trainer.n_devices_per_node",
    }
)


@dataclass(frozen=True)
class BatchMath:
    """The arithmetic of one step. A prompt's responses all stay on one device.

    Attributes:
        prompts: prompts a step, over all devices.
        responses_per_prompt: `rollout.n`.
        mini_batch_prompts: prompts an optimizer step, over all devices.
        devices_per_node, nodes: their product is the world size.
        tensor_parallel: devices a rollout engine.
        actor_micro_batch, critic_micro_batch: sequences of one forward and backward pass on one device.
        old_log_prob_micro_batch, ref_log_prob_micro_batch: sequences of one forward pass on one device.
        reward_micro_batch: sequences of one forward pass of the reward model on one device at most.
        actor_epochs, critic_epochs: passes over the step's batch.

    `critic_micro_batch` is None without a critic, `ref_log_prob_micro_batch` without a reference,
    `reward_micro_batch` without a reward model.
    """

    prompts: int
    responses_per_prompt: int
    mini_batch_prompts: int
    nodes: int
    devices_per_node: int
    tensor_parallel: int
    actor_micro_batch: int
    old_log_prob_micro_batch: int
    critic_micro_batch: int | None
    ref_log_prob_micro_batch: int | None
    reward_micro_batch: int | None
    actor_epochs: int
    critic_epochs: int

    @property
    def devices(self) -> int:
        """World size."""
        return self.nodes * self.devices_per_node

    @property
    def rollout_engines(self) -> int:
        return self.devices // self.tensor_parallel

    @property
    def sequences(self) -> int:
        """Sequences a step, over all devices."""
        return self.prompts * self.responses_per_prompt

    @property
    def sequences_per_device(self) -> int:
        return self.sequences // self.devices

    @property
    def mini_batches(self) -> int:
        """Mini-batches a pass over the step's batch."""
        return self.prompts // self.mini_batch_prompts

    @property
    def mini_batch_sequences(self) -> int:
        """Sequences of one mini-batch, over all devices."""
        return self.mini_batch_prompts * self.responses_per_prompt

    @property
    def mini_batch_sequences_per_device(self) -> int:
        return self.mini_batch_sequences // self.devices

    @property
    def actor_micro_batches(self) -> int:
        """Micro-batches of one mini-batch on one device."""
        return self.mini_batch_sequences_per_device // self.actor_micro_batch

    @property
    def critic_micro_batches(self) -> int:
        """Micro-batches of one mini-batch on one device; 0 without a critic."""
        if self.critic_micro_batch is None:
            return 0
        return self.mini_batch_sequences_per_device // self.critic_micro_batch

    @property
    def actor_optimizer_steps(self) -> int:
        """Optimizer steps of the actor a step."""
        return self.mini_batches * self.actor_epochs

    @property
    def critic_optimizer_steps(self) -> int:
        """Optimizer steps of the critic a step; 0 without a critic."""
        return self.mini_batches * self.critic_epochs if self.critic_micro_batch else 0

    def problems(self) -> list[Problem]:
        """What does not divide, each with the nearest values that would."""
        if self.sequences > LARGEST_BATCH:
            right = (
                f"with rollout.n={self.responses_per_prompt} a step has more than {LARGEST_BATCH} sequences; lower it"
            )
            return [Problem(TRAIN_BATCH, self.prompts, right)]
        return [*self._device_problems(), *self._batch_problems(), *self._micro_batch_problems()]

    def _device_problems(self) -> Iterator[Problem]:
        if self.devices_per_node % self.tensor_parallel:
            valid = _divisors(self.devices_per_node)
            yield Problem(
                TENSOR_PARALLEL,
                self.tensor_parallel,
                f"must divide the {_count(self.devices_per_node, 'device')} of a node "
                f"(trainer.n_devices_per_node); {_nearest(self.tensor_parallel, valid)}",
            )

    def _batch_problems(self) -> Iterator[Problem]:
        spread = [size for size in _divisors(self.prompts) if size % self.devices == 0]
        if self.mini_batch_prompts % self.devices:
            units = spread or _multiples(self.devices, self.mini_batch_prompts)
            with_it = "" if spread else f", with {TRAIN_BATCH} a multiple of it"
            yield Problem(
                MINI_BATCH,
                self.mini_batch_prompts,
                "counts prompts over all devices and must be a multiple of the "
                f"{_count(self.devices, 'device')}; {_nearest(self.mini_batch_prompts, units)}{with_it}",
            )
        elif self.prompts % self.mini_batch_prompts:
            batches = _multiples(self.mini_batch_prompts, self.prompts)
            or_mini = f"; or {MINI_BATCH}, {_nearest(self.mini_batch_prompts, spread)}" if spread else ""
            yield Problem(
                TRAIN_BATCH,
                self.prompts,
                f"must be a multiple of {MINI_BATCH}={self.mini_batch_prompts}; "
                f"{_nearest(self.prompts, batches)}{or_mini}",
            )

    def _micro_batch_problems(self) -> Iterator[Problem]:
        if self.mini_batch_prompts % self.devices or self.prompts % self.devices:
            return
        of_mini = (self.mini_batch_sequences_per_device, "sequences of a mini-batch on one device")
        of_step = (self.sequences_per_device, "sequences of a step on one device")
        cuts = [
            (ACTOR_MICRO, self.actor_micro_batch, *of_mini),
            (CRITIC_MICRO, self.critic_micro_batch, *of_mini),
            (OLD_LOG_PROB_MICRO, self.old_log_prob_micro_batch, *of_step),
            (REF_LOG_PROB_MICRO, self.ref_log_prob_micro_batch, *of_step),
        ]
        for name, size, whole, what in cuts:
            if size is not None and whole % size:
                nearest = _nearest(size, _divisors(whole))
                yield Problem(name, size, f"must divide the {whole} {what}; {nearest}")

    def table(self) -> Table:
        """The cut of a step's batch, one quantity a line."""
        table = Table(title="One step", title_justify="left")
        table.add_column("quantity", no_wrap=True)
        table.add_column("size", justify="right", no_wrap=True)
        table.add_column("from", overflow="fold")
        for row in self._rows():
            table.add_row(*row)
        return table

    def text(self, width: int = 116) -> str:
        """The table as plain text."""
        page = io.StringIO()
        Console(file=page, width=width, color_system=None, legacy_windows=False).print(self.table())
        return page.getvalue().rstrip()

    def _rows(self) -> Iterator[tuple[str, str, str]]:
        devices, mini = self.devices, self.mini_batch_prompts
        nodes = f"trainer.nnodes {self.nodes} x n_devices_per_node {self.devices_per_node}"
        yield "devices", str(devices), nodes
        yield (
            "rollout engines",
            _ratio(devices, self.tensor_parallel),
            f"{devices} devices / rollout.tensor_model_parallel_size {self.tensor_parallel}",
        )
        yield "prompts", str(self.prompts), TRAIN_BATCH
        yield (
            "sequences",
            str(self.sequences),
            f"{self.prompts} prompts x rollout.n {self.responses_per_prompt}",
        )
        yield (
            "sequences a device",
            _ratio(self.sequences, devices),
            f"{self.sequences} sequences / {devices} devices",
        )
        yield (
            "mini-batches",
            _ratio(self.prompts, mini),
            f"{self.prompts} prompts / actor.ppo_mini_batch_size {mini}",
        )
        yield (
            "mini-batch a device, in sequences",
            _ratio(self.mini_batch_sequences, devices),
            f"{mini} prompts x {self.responses_per_prompt} / {devices} devices",
        )
        yield from self._update_rows("actor", self.actor_micro_batch, self.actor_epochs)
        yield from self._update_rows("critic", self.critic_micro_batch, self.critic_epochs)
        yield from self._forward_rows("old log-prob", "rollout", self.old_log_prob_micro_batch)
        yield from self._forward_rows("reference", "ref", self.ref_log_prob_micro_batch)
        if self.reward_micro_batch is not None:
            yield (
                "reward model micro-batches",
                str(-(-self.sequences // (self.devices * self.reward_micro_batch))),
                f"sequences a device / reward_model.micro_batch_size_per_device {self.reward_micro_batch}, rounded up",
            )

    def _update_rows(self, model: str, micro: int | None, epochs: int) -> Iterator[tuple[str, str, str]]:
        if micro is None:
            return
        yield (
            f"{model} micro-batches a mini-batch",
            _ratio(self.mini_batch_sequences, self.devices * micro),
            f"mini-batch a device / {model}.ppo_micro_batch_size_per_device {micro}",
        )
        yield (
            f"{model} optimizer steps",
            _ratio(self.prompts * epochs, self.mini_batch_prompts),
            f"mini-batches x {model}.ppo_epochs {epochs}",
        )

    def _forward_rows(self, what: str, node: str, micro: int | None) -> Iterator[tuple[str, str, str]]:
        if micro is None:
            return
        yield (
            f"{what} micro-batches",
            _ratio(self.sequences, self.devices * micro),
            f"sequences a device / {node}.log_prob_micro_batch_size_per_device {micro}",
        )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _ratio(whole: int, part: int) -> str:
    return str(whole // part) if whole % part == 0 else f"{whole / part:.2f} (not whole)"


def _divisors(number: int) -> list[int]:
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def _multiples(unit: int, value: int) -> list[int]:
    below = value // unit * unit
    return [size for size in (below, below + unit) if size > 0]


def _nearest(value: int, valid: list[int]) -> str:
    below = [size for size in valid if size < value][-1:]
    above = [size for size in valid if size > value][:1]
    return "nearest: " + " or ".join(str(size) for size in below + above)
