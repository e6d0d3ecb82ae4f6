"""Stages in any order, work only in its own; each call of a switch or a reshard fails in turn, and the losses stay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.devices import PLATFORM
from tests.hybrid.faults import Fault, some
from tests.ranks import run_ranks
from tests.tiny_model import save_tiny_model

pytestmark = pytest.mark.slow

PROMPTS = [[1, 4, 13, 6, 14, 11, 13, 7]]
CYCLE = ("generate", "old_log_prob", "update_actor", "reshard")
MOST_FAULTS = 6  # of each kind of driver call
MOST_OF_RESHARD = 2  # of each kind of torch's operations in a reshard
BUCKET = 20_000  # bytes; several collectives a reshard


@contextmanager
def _in_reshards(hybrid: Any, fault: Fault) -> Iterator[None]:
    """Within it `fault` is there while the engine reshards."""
    resharder = hybrid._resharder
    reshard = resharder.reshard

    def faulty(version: int) -> Any:
        with fault:
            return reshard(version)

    resharder.reshard = faulty
    try:
        yield
    finally:
        resharder.reshard = reshard


def _engines(model_path: str, policy: str = "offload", sleep_level: str = "auto", zero_stage: int = 2) -> Any:
    from rlhf_npu.config import DataConfig, ModelConfig, OptimConfig, RolloutConfig
    from rlhf_npu.engines.models import load_policy
    from rlhf_npu.engines.rollout import RolloutEngine
    from rlhf_npu.engines.trainer_engine import TrainerEngine
    from rlhf_npu.hybrid.engine import HybridEngine
    from rlhf_npu.hybrid.resharding.reshard import Resharder
    from rlhf_npu.hybrid.switch_plan import Policy, Stage, plan_switches
    from rlhf_npu.hybrid.tags import ROLLOUT_TAGS, make_tags

    data = DataConfig(train_files=["x"], val_files=[], train_batch_size=1, max_prompt_length=16, max_response_length=16)
    model = ModelConfig(path=model_path, dtype="float32")
    config = RolloutConfig(
        n=1, kv_cache_memory_gb=0.01, gpu_memory_utilization=0.02, log_prob_micro_batch_size_per_device=1
    )
    rollout = RolloutEngine(model, config, data, PLATFORM, [2])
    trainer = TrainerEngine(
        load_policy(model),
        OptimConfig(lr=1e-2),
        zero_stage=zero_stage,
        dtype="float32",
        grad_clip=1.0,
        optimizer_steps=1000,
        platform=PLATFORM,
        role="actor",
    )
    sizes = dict.fromkeys((*ROLLOUT_TAGS, *trainer.tags), 1 << 20)
    stages = [Stage(stage) for stage in CYCLE]
    plan = plan_switches(make_tags(sizes, sleep_level), stages, {}, 1 << 40, Policy(policy))
    return (
        HybridEngine(rollout, Resharder(trainer.module, rollout, BUCKET), {"actor": trainer}, plan, PLATFORM),
        rollout,
        trainer,
    )


def _train(trainer: Any) -> float:
    import torch
    from tensordict import TensorDict

    from rlhf_npu.algorithms.token_probs import log_probs_from_logits
    from rlhf_npu.engines.trainer_engine import MicroLoss

    def likelihood(module: torch.nn.Module, batch: TensorDict) -> MicroLoss:
        ids = batch["ids"]
        loss = -log_probs_from_logits(module(input_ids=ids, use_cache=False).logits[:, :-1], ids[:, 1:]).mean()
        return MicroLoss(loss, {"loss": loss})

    ids = torch.tensor(PROMPTS, device=PLATFORM.device())
    return float(trainer.train_mini_batch([TensorDict({"ids": ids}, batch_size=[1])], likelihood)["loss"])


def _enter(hybrid: Any, stage: str, messages: list[str]) -> Any:
    """Enter a stage, once more if it fails."""
    from rlhf_npu.errors import SwitchError
    from rlhf_npu.hybrid.switch_plan import Stage

    try:
        return hybrid.enter(Stage(stage))
    except SwitchError as error:
        messages.append(str(error))
        return hybrid.enter(Stage(stage))


def _cycle(hybrid: Any, rollout: Any, trainer: Any, messages: list[str]) -> tuple[float, Any]:
    _enter(hybrid, "old_log_prob", messages)
    _enter(hybrid, "update_actor", messages)
    loss = _train(trainer)
    _enter(hybrid, "generate", messages)
    ((completion,),) = rollout.generate(PROMPTS, n=1, seed=0, temperature=0.0)
    return loss, completion.token_ids


def _count_and_run(model_path: str) -> Any:
    """Which calls a cycle makes, and the losses and responses of as many cycles as these can fail."""
    from allocator import SleepPool

    hybrid, rollout, trainer = _engines(model_path, zero_stage=3)
    pool = SleepPool.get(PLATFORM.device())
    results = [_cycle(hybrid, rollout, trainer, [])]
    before, watch = pool.driver_calls(), Fault()
    with _in_reshards(hybrid, watch):
        results.append(_cycle(hybrid, rollout, trainer, []))
    calls = {call: count - before[call] for call, count in pool.driver_calls().items()}
    of_driver = [(call, nth) for call, count in calls.items() for nth in some(count, MOST_FAULTS)]
    of_reshard = [(name, nth) for name, count in watch.counts.items() for nth in some(count, MOST_OF_RESHARD)]
    results += [_cycle(hybrid, rollout, trainer, []) for _ in of_driver + of_reshard]
    return of_driver, of_reshard, results


def _run_with_faults(model_path: str, of_driver: list[tuple[str, int]], of_reshard: list[tuple[str, int]]) -> Any:
    from allocator import SleepPool

    hybrid, rollout, trainer = _engines(model_path, zero_stage=3)
    pool = SleepPool.get(PLATFORM.device())
    results = [_cycle(hybrid, rollout, trainer, []) for _ in range(2)]
    told_of_driver, told_of_reshard = [], []
    for call, nth in of_driver:
        pool.inject_fault(call, nth)
        messages: list[str] = []
        results.append(_cycle(hybrid, rollout, trainer, messages))
        pool.inject_fault(call, 0)
        told_of_driver.append(messages)
    for name, nth in of_reshard:
        messages = []
        with _in_reshards(hybrid, Fault(name, nth)):
            results.append(_cycle(hybrid, rollout, trainer, messages))
        told_of_reshard.append(messages)
    return told_of_driver, told_of_reshard, results


@pytest.fixture(scope="module")
def with_faults(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = str(save_tiny_model(tmp_path_factory.mktemp("faults") / "model"))
    (without,) = run_ranks(1, _count_and_run, folder)
    (faulty,) = run_ranks(1, _run_with_faults, folder, *without[:2])
    return without, faulty


def test_with_a_fault_in_each_cycle_the_losses_are_those_without_faults(with_faults: Any) -> None:
    (_, _, expected), (_, _, results) = with_faults
    assert results == expected
    assert len({loss for loss, _ in results}) == len(results)  # it trains


def test_each_driver_call_of_a_switch_fails_in_turn_and_is_named(with_faults: Any) -> None:
    (faults, _, _), (told, _, _) = with_faults
    assert {"create", "map", "unmap", "copy_in", "copy_out"} <= {call for call, _ in faults}
    failed = [messages[0] for messages in told if messages]
    assert len(failed) > len(faults) // 2
    for message in failed:
        assert "entering stage '" in message
        assert "phase '" in message
        assert "injected fault" in message
        assert any(tag in message for tag in ("weights", "kv_cache", "actor.params", "actor.optimizer"))


def test_each_kind_of_operation_of_a_reshard_fails_in_turn_and_is_named(with_faults: Any) -> None:
    (_, faults, _), (_, told, _) = with_faults
    names = {name for name, _ in faults}
    assert {"aten.zeros.default", "aten.copy_.default"} <= names  # the buckets, and the copies into and out of them
    assert any("allgather" in name for name in names)
    for (name, _), messages in zip(faults, told, strict=True):
        start = "entering stage 'reshard': phase 'reshard weights+actor.params' failed: "
        assert [message.startswith(start) for message in messages] == [True], name
        assert f"injected fault: {name}" in messages[0]


def _stages_in_any_order(model_path: str) -> Any:
    from allocator import SleepPool
    from rlhf_npu.errors import SwitchError
    from rlhf_npu.hybrid.switch_plan import Stage

    hybrid, rollout, trainer = _engines(model_path)
    messages = []
    for first, work in ((None, Stage.GENERATE), (Stage.TRAIN_ACTOR, Stage.GENERATE), (Stage.SAVE, Stage.TRAIN_ACTOR)):
        if first is not None:
            hybrid.enter(first)
        try:
            hybrid.require(work)
        except SwitchError as error:
            messages.append(str(error))
    said, reports = [], []
    for stage in ("update_actor", "generate", "save", "generate", "old_log_prob", "generate", "generate"):
        reports.append(hybrid.enter(Stage(stage)))
        if stage == "update_actor":
            _train(trainer)
        if stage == "generate":
            hybrid.require(Stage.GENERATE)
            said.append([one[0].token_ids for one in rollout.generate(PROMPTS, n=1, seed=0, temperature=0.0)])
    stats = SleepPool.get(PLATFORM.device()).stats()
    asleep = {name: tag.is_asleep for name, tag in stats.items()}
    return messages, said, reports, asleep, [_plan_again(hybrid, trainer, capacity) for capacity in (1 << 40, 1 << 20)]


def _plan_again(hybrid: Any, trainer: Any, capacity: int) -> Any:
    """Decide by a step whose peaks are measured; twice, of which the second time has none."""
    from rlhf_npu.hybrid.calibration import Calibration
    from rlhf_npu.hybrid.measured_plan import plan_again
    from rlhf_npu.hybrid.memory.memory_demand import Device
    from rlhf_npu.hybrid.memory.memory_plan import MemoryPlan
    from rlhf_npu.hybrid.switch_plan import Stage
    from tests.hybrid.test_memory_plan import config_of

    first, hybrid.calibration = hybrid.plan, Calibration(PLATFORM)
    for stage in (Stage.GENERATE, Stage.LOG_PROB, Stage.TRAIN_ACTOR, Stage.GENERATE):
        hybrid.enter(stage)
        if stage is Stage.TRAIN_ACTOR:
            _train(trainer)
    predicted = MemoryPlan({}, Device("cpu", capacity, capacity), 0, first)
    second = plan_again(hybrid, config_of(), predicted, PLATFORM)
    again = plan_again(hybrid, config_of(), predicted, PLATFORM)
    hybrid.enter(Stage.LOG_PROB)
    hybrid.enter(Stage.GENERATE)
    return first, second, again, hybrid.plan


@pytest.fixture(scope="module")
def in_any_order(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = str(save_tiny_model(tmp_path_factory.mktemp("order") / "model"))
    (results,) = run_ranks(1, _stages_in_any_order, folder)
    return results


def test_the_first_steps_peaks_decide_the_plan_of_those_that_follow(in_any_order: Any) -> None:
    roomy, tight = in_any_order[-1]
    first, second, again, held = roomy
    assert first.copied_bytes() > 0
    assert str(second.plan) == "everything stays on the device"
    assert second.burst is None
    assert again.plan == held == second.plan
    # A process that holds vLLM, DeepSpeed and a model takes this much, and a mebibyte is less.
    measured = [second.surplus.workspace[stage] for stage in second.plan.cycle if stage.value != "reshard"]
    assert all(100 << 20 < taken < 100 << 30 for taken in measured)
    first, second, again, held = tight
    assert second.plan == held == again.plan == first
    assert second.burst is not None
    assert second.burst.missing > 100 << 20
    assert again.burst is None  # there was nothing more to decide by


def test_stages_can_be_entered_in_any_order_and_work_out_of_its_own_is_refused(in_any_order: Any) -> None:
    messages, said, reports, asleep, _ = in_any_order
    assert ["no stage" in messages[0], "stage 'update_actor'" in messages[1], "stage 'save'" in messages[2]] == [
        True
    ] * 3
    assert all(one == said[0] for one in said)
    resharded = [report.reshard is not None for report in reports]
    # After training, and where the way led through a stage in which the weights were dropped.
    assert resharded == [False, True, False, False, False, True, False]
    assert reports[-1].phases == ()
    assert asleep == {"weights": False, "kv_cache": False, "actor.params": True, "actor.optimizer": True}
    train = reports[0].after.mapped
    assert train["weights"] == train["kv_cache"] == 0 < train["actor.params"] <= train["actor.optimizer"]
