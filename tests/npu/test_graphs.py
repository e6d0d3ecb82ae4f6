"""Captured graphs on the simulated NPU, and that the pool's memory stays where they point to."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch_npu

from allocator import SleepPool
from rlhf_npu.engines.rollout import NPU_GRAPHS
from rlhf_npu.platform import NPU
from tests.aclsim import control
from tests.npu.rank_processes import RankProcesses
from tests.ranks import run_ranks
from tests.tiny_model import save_tiny_model

ROOT = Path(__file__).parents[2]
SIZES = (4, 8)
PROMPT = [1, 4, 13, 6, 14, 11, 13, 7]


def _numbers(*sizes: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed))


def _captured(
    function: Callable[..., torch.Tensor], *inputs: torch.Tensor
) -> tuple[torch_npu.npu.NPUGraph, torch.Tensor]:
    function(*inputs)
    torch_npu.npu.synchronize()
    graph = torch_npu.npu.NPUGraph()
    with torch_npu.npu.graph(graph):
        output = function(*inputs)
    return graph, output


def _layer(inputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """With operators of both kinds: late ones of aclnn, and those that a CPU kernel computes."""
    hidden = torch.nn.functional.layer_norm(inputs @ weights, (weights.shape[1],))
    return torch.nn.functional.silu(hidden).cumsum(0) * 2 + 1


def check_new_values_in_the_inputs_are_what_a_replay_computes_with() -> None:
    inputs, weights = _numbers(*SIZES).to("npu"), _numbers(8, 6, seed=1).to("npu")
    graph, output = _captured(_layer, inputs, weights)
    for seed in range(3):
        new = _numbers(*SIZES, seed=seed)
        inputs.copy_(new)
        graph.replay()
        assert torch.allclose(output.cpu(), _layer(new, weights.cpu()), atol=1e-5)


def check_a_capture_changes_nothing_and_each_replay_runs_all() -> None:
    counter, total = torch.zeros(4, device="npu"), torch.zeros(4, device="npu")

    def count() -> torch.Tensor:
        counter.add_(1)  # by aclnn
        total.clamp_(max=100).erfinv_().add_(counter)
        return counter.clone()

    torch_npu.npu.synchronize()
    graph = torch_npu.npu.NPUGraph()
    with torch_npu.npu.graph(graph):
        output = count()
    assert counter.tolist() == total.tolist() == [0] * 4
    for replays in (1, 2):
        graph.replay()
        assert output.tolist() == counter.tolist() == [replays] * 4


def check_streams_that_join_by_events_are_captured_too() -> None:
    inputs, side = _numbers(*SIZES).to("npu"), torch_npu.npu.Stream()
    torch_npu.npu.synchronize()
    graph = torch_npu.npu.NPUGraph()
    with torch_npu.npu.graph(graph):
        doubled = inputs * 2
        side.wait_stream(torch_npu.npu.current_stream())
        with torch_npu.npu.stream(side):
            summed = doubled.cumsum(0)
        torch_npu.npu.current_stream().wait_stream(side)
        output = summed + 1
    inputs.fill_(1)
    graph.replay()
    assert torch.equal(output.cpu(), (torch.ones(SIZES) * 2).cumsum(0) + 1)


def check_a_graph_over_the_pool_fails_asleep_and_has_the_new_weights_after() -> None:
    pool = SleepPool.get("npu:0", namespace="graph")
    with pool.region("weights"):
        weights = _numbers(8, 6, seed=1).to("npu")
    host, inputs, address = _numbers(*SIZES), _numbers(*SIZES).to("npu"), weights.data_ptr()
    for layer, operator in ((_layer, "aclnnMm"), (lambda x, w: torch.cumsum(w, 0) + x.sum(), "aten::cumsum")):
        graph, output = _captured(layer, inputs, weights)
        for level in (1, 2):
            new = _numbers(8, 6, seed=level + 1)
            pool.sleep(level=level)
            faults = control.stats().faults
            graph.replay()
            with pytest.raises(RuntimeError) as error:
                torch_npu.npu.synchronize()
            assert operator in str(error.value)
            assert "it sleeps" in str(error.value)
            assert control.stats().faults == faults + 1
            pool.wake_up()
            weights.copy_(new)
            graph.replay()
            assert torch.allclose(output.cpu(), layer(host, new), atol=1e-5)
            assert weights.data_ptr() == address


def check_weights_that_were_moved_are_stale_in_a_graph() -> None:
    inputs, weights = _numbers(*SIZES).to("npu"), _numbers(8, 6, seed=1).to("npu")
    graph, output = _captured(_layer, inputs, weights)
    graph.replay()
    before, moved = output.clone(), _numbers(8, 6, seed=2).to("npu")
    weights.data = moved
    graph.replay()
    assert torch.equal(output, before)
    assert not torch.allclose(output, _layer(inputs, weights))


def check_memory_that_was_freed_is_an_error_that_names_the_operator() -> None:
    freed = [torch.ones(1 << 22, 6, device="npu")]
    graph, _ = _captured(lambda: freed[0].cumsum(0))
    freed.clear()
    torch_npu.npu.empty_cache()
    graph.replay()
    with pytest.raises(RuntimeError, match=r"aten::cumsum: argument 'self' .* it was freed"):
        torch_npu.npu.synchronize()


def check_the_tasks_of_a_group_are_replaced_before_a_replay() -> None:
    total, first, second = (torch.full((4,), value, device="npu") for value in (0.0, 1.0, 10.0))
    torch_npu.npu.synchronize()
    graph, updates = torch_npu.npu.NPUGraph(), torch_npu.npu.Stream()
    with torch_npu.npu.graph(graph):
        stream = torch_npu.npu.current_stream()
        total.mul_(2)
        torch_npu.npu.graph_task_group_begin(stream)
        total.add_(first)
        group = torch_npu.npu.graph_task_group_end(stream)
    graph.replay()
    assert total.tolist() == [1] * 4
    with torch_npu.npu.stream(updates):
        torch_npu.npu.graph_task_update_begin(updates, group)
        total.add_(second)
        torch_npu.npu.graph_task_update_end(updates)
    updates.synchronize()
    graph.replay()
    assert total.tolist() == [12] * 4


CHECKS = {name.removeprefix("check_"): one for name, one in list(globals().items()) if name.startswith("check_")}


def _reduce_in_a_graph() -> list[list[float]]:
    rank = dist.get_rank()
    total = torch.zeros(3, device="npu")
    dist.all_reduce(total)
    torch_npu.npu.synchronize()
    graph = torch_npu.npu.NPUGraph()
    with torch_npu.npu.graph(graph):
        doubled = total * 2
        dist.all_reduce(doubled)
        dist.all_reduce(doubled)
        output = doubled + 1
    results = []
    for seed in range(3):
        total.fill_(seed + rank)
        graph.replay()
        eager = total.clone()
        dist.all_reduce(eager)
        results.append([output[0].item(), eager[0].item()])
    return results


@pytest.mark.parametrize("streams", ["eager", "lazy"])
def test_collectives_of_a_graph_run_at_each_replay(streams: str) -> None:
    with RankProcesses(2, ACLSIM_STREAM=streams) as world:
        results = world.run(_reduce_in_a_graph)
    expected = [[2 * 2 * (2 * seed + 1) + 1, 2 * seed + 1] for seed in range(3)]
    assert results == [expected, expected]


# torch_npu cannot capture again in a process in which it failed to.
WAIT = """
import pytest, torch
numbers = torch.ones(4, device="npu")
graph = torch.npu.NPUGraph()
torch.npu.synchronize()
with pytest.raises(RuntimeError, match="the capture was invalidated before") as error, torch.npu.graph(graph):
    numbers.mul_(2)
    numbers.tolist()
assert "is being captured" in str(error.value.__context__)
assert numbers.tolist() == [1] * 4
"""
NOT_JOINED = """
import pytest, torch
numbers, side = torch.ones(4, device="npu"), torch.npu.Stream()
torch.npu.synchronize()
with pytest.raises(RuntimeError, match="its work was never waited for"), torch.npu.graph(torch.npu.NPUGraph()):
    side.wait_stream(torch.npu.current_stream())
    with torch.npu.stream(side):
        numbers.cumsum(0)
"""

FROM_OUTSIDE = """
import pytest, torch
event, side = torch.npu.Event(), torch.npu.Stream()
event.record(side)
torch.npu.synchronize()
with pytest.raises(RuntimeError) as error, torch.npu.graph(torch.npu.NPUGraph()):
    event.wait()
    torch.ones(3, device="npu")
words = str(error.value) + str(error.value.__context__)
assert "recorded outside of the capture" in words or "the capture was invalidated before" in words, words
"""


def main() -> None:
    """Prints a line of JSON a check: its name and, if it failed, why."""
    for name, check in CHECKS.items():
        error = None
        try:
            check()
        except Exception:  # noqa: BLE001  # reported by the test; the other checks run all the same
            error = traceback.format_exc()
        print(json.dumps({"check": name, "error": error}), flush=True)


@pytest.fixture(scope="module")
def errors() -> Callable[[str], dict[str, Any]]:
    """Why each check failed, if it did, with eager or lazy streams."""
    return functools.cache(_run)


def _run(streams: str) -> dict[str, Any]:
    program = "from tests.npu.test_graphs import main; main()"
    command = [sys.executable, "-W", "ignore", "-c", program]
    environment = os.environ | {"ACLSIM_STREAM": streams}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"check"')]
    return {line["check"]: line["error"] for line in lines}


@pytest.mark.parametrize("streams", ["eager", "lazy"])
@pytest.mark.parametrize("name", CHECKS)
def test_graph(errors: Callable[[str], dict[str, Any]], name: str, streams: str) -> None:
    assert errors(streams)[name] is None, errors(streams)[name]


@pytest.mark.parametrize(
    "program", [WAIT, NOT_JOINED, FROM_OUTSIDE], ids=["a_wait", "a_stream_that_was_not_joined", "an_event_from_outside"]
)
def test_a_capture_ends_in_an_error_by(program: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models that differ in their weights alone."""
    folder = tmp_path_factory.mktemp("graphs")
    first, other = (save_tiny_model(folder / str(seed), positions=256, seed=seed) for seed in (0, 1))
    return first, other


def _generated(models: tuple[Path, Path], streams: str, *options: str) -> dict[str, Any]:
    settings = {"kv_cache_memory_bytes": 64 << 20, "compilation_config": {"cudagraph_mode": NPU_GRAPHS}}
    variables = {
        "ACLSIM_STREAM": streams,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "SLEEP_POOL_POISON": "1",
        "HF_HUB_OFFLINE": "1",
        **NPU.environment,
    }
    command = [sys.executable, "-m", "tests.npu.graph_generation", *map(str, models), json.dumps(settings), *options]
    ran = subprocess.run(
        command, env=os.environ | variables, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
    result: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return result


@pytest.mark.slow
@pytest.mark.parametrize("streams", ["eager", "lazy"])
def test_vllms_graphs_say_after_sleep_and_with_new_weights_what_an_eager_engine_says(
    models: tuple[Path, Path], streams: str
) -> None:
    eager, graphs = _generated(models, streams), _generated(models, streams, "--graphs")
    assert eager["counts"]["moved"] == [0, 0]
    assert eager["said"]["first"] == eager["said"]["slept"] == eager["said"]["moved"] != eager["said"]["other"]
    for name in ("first", "slept", "other"):
        assert graphs["said"][name] == eager["said"][name], name
    captures, replays = zip(*graphs["counts"].values(), strict=True)
    assert captures[0] > 0
    assert set(captures) == {captures[0]}
    assert list(replays) == sorted(set(replays))
    assert graphs["stayed"]
    # As it would be with weights that a reshard moves: this test sees it.
    assert graphs["said"]["moved"] != eager["said"]["moved"]


def _cycles_with_graphs(folder: str) -> list[dict[str, Any]]:
    from rlhf_npu.config import DataConfig, ModelConfig, RolloutConfig
    from rlhf_npu.engines.models import load_policy
    from rlhf_npu.engines.rollout import RolloutEngine
    from rlhf_npu.hybrid.engine import HybridEngine
    from rlhf_npu.hybrid.resharding.reshard import Resharder
    from rlhf_npu.hybrid.switch_plan import Stage, plan_switches
    from rlhf_npu.hybrid.tags import make_tags

    counts: Counter[str] = Counter()
    _count_calls(counts, "capture_begin")
    _count_calls(counts, "replay")
    data = DataConfig(train_files=["x"], val_files=[], train_batch_size=1, max_prompt_length=16, max_response_length=16)
    model = ModelConfig(path=folder, dtype="float32")
    config = RolloutConfig(
        n=1, max_num_seqs=8, enforce_eager=False, gpu_memory_utilization=0.02, log_prob_micro_batch_size_per_device=1
    )
    rollout, policy = RolloutEngine(model, config, data, NPU, [2]), load_policy(model)
    resharder, cycles = Resharder(policy, rollout, bucket_bytes=1 << 20), []
    for step, level in enumerate((1, 2, 1, 2)):
        tags = make_tags({"weights": 1, "kv_cache": 1}, str(level))
        plan = plan_switches(tags, (Stage.GENERATE, Stage.TRAIN_ACTOR, Stage.RESHARD), {}, capacity=2)
        hybrid = HybridEngine(rollout, resharder, {}, plan, NPU)
        hybrid.enter(Stage.TRAIN_ACTOR)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
        hybrid.enter(Stage.GENERATE)
        before = counts["replay"]
        (completions,) = rollout.generate([PROMPT], n=3, seed=step)
        cycles.append(
            {
                "difference": max(_difference(policy, one.token_ids, one.log_probs) for one in completions),
                "captures": counts["capture_begin"],
                "replays": counts["replay"] - before,
                "addresses": [parameter.data_ptr() for parameter in rollout.module.parameters()],
            }
        )
    return cycles


def _count_calls(counts: Counter[str], name: str) -> None:
    graph: Any = torch_npu.npu.NPUGraph
    function = getattr(graph, name)

    def counted(*arguments: Any, **named: Any) -> Any:
        counts[name] += 1
        return function(*arguments, **named)

    setattr(graph, name, counted)


def _difference(policy: Any, tokens: tuple[int, ...], log_probs: tuple[float, ...]) -> float:
    """The largest one of the trainer's log-probabilities from the engine's."""
    device = next(policy.parameters()).device
    with torch.no_grad():
        logits = policy(torch.tensor([[*PROMPT, *tokens]], device=device)).logits[0, len(PROMPT) - 1 : -1]
    own = logits.log_softmax(-1).gather(1, torch.tensor(tokens, device=device)[:, None])[:, 0]
    return float((own.cpu() - torch.tensor(log_probs)).abs().max())


@pytest.mark.slow
def test_after_each_reshard_graphs_compute_with_the_trainers_weights(models: tuple[Path, Path]) -> None:
    (cycles,) = run_ranks(1, _cycles_with_graphs, str(models[0]))
    for cycle in cycles:
        assert cycle["difference"] < 1e-5
        assert cycle["captures"] == cycles[0]["captures"] > 0
        assert cycle["replays"] > 0
        assert cycle["addresses"] == cycles[0]["addresses"]
