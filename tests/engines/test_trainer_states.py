"""Models that train or score sleep between all uses, and go on to the last bit as if they had not."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.devices import PLATFORM
from tests.ranks import run_ranks
from tests.tiny_model import save_tiny_model

pytestmark = pytest.mark.slow

WORLD, STEPS, SEQUENCES, LENGTH = 2, 3, 4, 12
TRAINED = [(stage, dtype) for dtype in ("float32", "bfloat16") for stage in (0, 1, 2, 3)]
FROZEN = [(3, "bfloat16"), (0, "bfloat16")]
# Bytes of an element by tag, and over how many ranks they are divided; ZeRO 3 has its bucket beside the gradients.
BYTES: dict[tuple[int, str], dict[str, float]] = {
    (0, "float32"): {"params": 4, "optimizer": 8},
    (1, "float32"): {"params": 4, "optimizer": 12 / WORLD},
    (2, "float32"): {"params": 4, "optimizer": 12 / WORLD},
    (3, "float32"): {"params": 4 / WORLD, "grads": 4 / WORLD + 4, "optimizer": 12 / WORLD},
    (0, "bfloat16"): {"params": 2, "optimizer": 12},
    (1, "bfloat16"): {"params": 2, "optimizer": 12 / WORLD},
    (2, "bfloat16"): {"params": 2, "optimizer": 12 / WORLD},
    (3, "bfloat16"): {"params": 2 / WORLD, "grads": 4 / WORLD + 2, "optimizer": 12 / WORLD},
}


@dataclass(frozen=True)
class Course:
    """What a model gave: values before each step, what the steps reported, and the weights at the end."""

    values: list[list[float]]
    metrics: list[dict[str, float]]
    weights: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Memory:
    """Bytes that each tag holds, and of the largest storage in none while all sleep; whether addresses stayed."""

    tags: dict[str, int]
    largest_outside: int
    addresses_stay: bool


def _run(model_path: str) -> tuple[dict[Any, Any], dict[Any, Any]]:
    from allocator import SleepPool

    pool = SleepPool.get(PLATFORM.device())
    assert pool.stats() == {}  # no region was opened: torch's own allocator makes the first frozen model's shards
    frozen = {case: _score_and_sleep(model_path, *case, pool) for case in FROZEN}
    trained = {case: (_train(model_path, *case), _train_and_sleep(model_path, *case, pool)) for case in TRAINED}
    return trained, frozen


def _train(model_path: str, stage: int, dtype: str) -> Course:
    engine = _trainer(model_path, stage, dtype, None)
    course = [_step(engine, step) for step in range(STEPS)]
    assert engine.tags == ()
    return _course(engine, course)


def _train_and_sleep(model_path: str, stage: int, dtype: str, pool: Any) -> tuple[Course, Memory]:
    elsewhere = _storages()
    engine = _trainer(model_path, stage, dtype, f"critic{stage}{dtype}")
    addresses = _addresses(engine)
    course = []
    for step in range(STEPS):
        _sleep(engine, pool)
        course.append(_step(engine, step, pool))
    _sleep(engine, pool)
    outside = _largest_outside(elsewhere, addresses)
    pool.wake_up(engine.tags)
    memory = Memory(_bytes_by_tag(engine, pool), outside, addresses_stay=_addresses(engine) == addresses)
    return _course(engine, course), memory


def _course(engine: Any, steps: list[tuple[list[float], dict[str, float]]]) -> Course:
    return Course([values for values, _ in steps], [metrics for _, metrics in steps], _weights(engine))


def _score_and_sleep(model_path: str, stage: int, dtype: str, pool: Any) -> Any:
    """Values of a frozen model before and after a sleep, and what of it lives where in between."""
    from rlhf_npu.engines.trainer_engine import InferenceEngine, infer

    elsewhere = _storages()
    role = f"ref{stage}"
    engine = InferenceEngine(
        _critic(model_path, stage, dtype), zero_stage=stage, dtype=dtype, platform=PLATFORM, role=role
    )
    before = infer(engine.module, _batch(0), 2, _values)
    addresses = _addresses_of(engine.module)
    _sleep(engine, pool)
    outside = _largest_outside(elsewhere, [*addresses, before.data_ptr()])
    pool.wake_up(engine.tags)
    memory = Memory(_bytes_by_tag(engine, pool), outside, addresses_stay=addresses == _addresses_of(engine.module))
    return before, infer(engine.module, _batch(0), 2, _values), memory


def _critic(model_path: str, stage: int, dtype: str) -> Any:
    """Loaded as a worker does it: at ZeRO 3 in shards from the beginning."""
    import deepspeed

    from rlhf_npu.config import ModelConfig
    from rlhf_npu.engines.models import load_critic

    critic = load_critic(ModelConfig(path=model_path, dtype=dtype), zero_stage=stage, device=PLATFORM.device())
    with deepspeed.zero.GatheredParameters(critic.value_head.weight, modifier_rank=0):
        torch.nn.init.constant_(critic.value_head.weight, 0.05)
    return critic


def _trainer(model_path: str, stage: int, dtype: str, role: str | None) -> Any:
    from rlhf_npu.config import OptimConfig
    from rlhf_npu.engines.trainer_engine import TrainerEngine

    return TrainerEngine(
        _critic(model_path, stage, dtype),
        OptimConfig(lr=1e-3),
        zero_stage=stage,
        dtype=dtype,
        grad_clip=0.5,
        optimizer_steps=STEPS,
        platform=PLATFORM,
        role=role,
    )


def _batch(step: int) -> Any:
    import torch.distributed as dist
    from tensordict import TensorDict

    generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
    ids = torch.randint(3, 15, (SEQUENCES, LENGTH), generator=generator)
    return TensorDict({"ids": ids, "targets": ids.float().cos()}, batch_size=[SEQUENCES]).to(PLATFORM.device())


def _step(engine: Any, step: int, pool: Any = None) -> tuple[list[float], dict[str, float]]:
    """Values, then a step; with a pool, only the parameters are awake for the values, and gradients hold anything."""
    from rlhf_npu.engines.trainer_engine import infer
    from rlhf_npu.engines.trainer_states import gradient_buffers

    if pool is not None:
        pool.wake_up(engine.tags[:1])
    values = infer(engine.module, _batch(step), 2, _values)
    if pool is not None:
        pool.wake_up(engine.tags)
        for gradients in gradient_buffers(engine.engine):
            gradients.fill_(torch.nan)
    return values.flatten().tolist(), engine.train_mini_batch(_batch(step).split(2), _squares)


def _values(module: torch.nn.Module, batch: Any) -> torch.Tensor:
    return module(input_ids=batch["ids"])


def _squares(module: torch.nn.Module, batch: Any) -> Any:
    from rlhf_npu.engines.trainer_engine import MicroLoss

    loss = (_values(module, batch).float() - batch["targets"]).square().mean() / WORLD
    return MicroLoss(loss, {"loss": loss})


def _sleep(engine: Any, pool: Any) -> None:
    engine.release_gathered()
    discard = [tag for tag in engine.tags if tag.endswith(".grads")]
    pool.sleep(offload=[tag for tag in engine.tags if tag not in discard], discard=discard)
    assert sum(pool.stats()[tag].mapped for tag in engine.tags) == 0


def _weights(engine: Any) -> dict[str, torch.Tensor]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {name: parameter.detach().cpu().clone() for name, parameter in engine.module.named_parameters()}


def _addresses(engine: Any) -> list[int]:
    from rlhf_npu.engines.trainer_states import states_of

    states = states_of(engine.engine)
    return [tensor.untyped_storage().data_ptr() for tensor in (*states.params, *states.grads, *states.optimizer)]


def _addresses_of(module: torch.nn.Module) -> list[int]:
    parameters = [getattr(parameter, "ds_tensor", parameter) for parameter in module.parameters()]
    return [tensor.untyped_storage().data_ptr() for tensor in (*parameters, *module.buffers())]


def _bytes_by_tag(engine: Any, pool: Any) -> dict[str, int]:
    from rlhf_npu.engines.trainer_states import held_bytes

    return {tag.partition(".")[2]: held_bytes(pool, tag) for tag in engine.tags}


def _largest_outside(before: dict[int, int], addresses: list[int]) -> int:
    """Bytes of the largest storage made since `before` that is at none of `addresses`."""
    known = {*before, *addresses}
    return max((size for address, size in _storages().items() if address not in known), default=0)


def _storages() -> dict[int, int]:
    """Address and bytes of everything on the device that Python knows of."""
    gc.collect()
    tensors = [entry for entry in gc.get_objects() if issubclass(type(entry), torch.Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == PLATFORM.name]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[Any, Any], dict[Any, Any]]]:
    return run_ranks(WORLD, _run, str(save_tiny_model(tmp_path_factory.mktemp("states") / "model")))


def test_training_that_sleeps_equals_training_that_does_not(ranks: Any) -> None:
    for trained, _ in ranks:
        for case, (plain, (asleep, _)) in trained.items():
            assert asleep.values == plain.values, case
            assert asleep.metrics == plain.metrics, case
            assert all(torch.equal(asleep.weights[name], weight) for name, weight in plain.weights.items()), case
            assert plain.metrics[-1]["loss"] < plain.metrics[0]["loss"], case


def test_every_state_is_in_its_tag(ranks: Any) -> None:
    for trained, _ in ranks:
        for case, (plain, (_, memory)) in trained.items():
            elements = sum(weight.numel() for weight in plain.weights.values())
            expected = {tag: size * elements for tag, size in BYTES[case].items()}
            assert memory.tags == pytest.approx(expected, rel=0.005), case
            assert memory.largest_outside < 1024, case
            assert memory.addresses_stay, case


def test_a_frozen_model_sleeps(ranks: Any) -> None:
    for _, frozen in ranks:
        for (stage, _), (before, after, memory) in frozen.items():
            assert torch.equal(before, after), stage
            assert memory.largest_outside < 1024, stage
            assert memory.addresses_stay, stage
        sizes = {stage: memory.tags["params"] for (stage, _), (_, _, memory) in frozen.items()}
        assert sizes[3] == pytest.approx(sizes[0] / WORLD, rel=0.005)
