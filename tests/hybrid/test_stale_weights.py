"""No stale weights: whatever of the rollout's is not the trainer's is named, in dense models and in mixtures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_npu.preflight.tiny_models import FAMILIES
from tests.devices import DEVICE, PLATFORM
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow

# vllm-ascend shares tables among the engines of a process, and caps no attention scores. A mixture must be a process's
# first model: vLLM makes the group of its experts' ranks only then.
GROUPS = [("Qwen3",), ("Qwen3-MoE",)] if DEVICE == "npu" else [("Qwen3-MoE", "Llama", "Qwen2", "Qwen3", "Gemma 2")]


_engines_kept: list[Any] = []  # the end of one takes the process group from all others


def _rollout(folder: Path, name: str, ranks: int) -> Any:
    from rlhf_npu.config import DataConfig, ModelConfig, RolloutConfig
    from rlhf_npu.engines.rollout import RolloutEngine

    data = DataConfig(train_files=["x"], val_files=[], train_batch_size=1, max_prompt_length=16, max_response_length=8)
    model = ModelConfig(path=str(folder / name), dtype=FAMILIES[name].dtype)
    config = RolloutConfig(
        n=1, kv_cache_memory_gb=0.01, log_prob_micro_batch_size_per_device=1, tensor_model_parallel_size=ranks
    )
    _engines_kept.append(RolloutEngine(model, config, data, PLATFORM, [2]))
    return _engines_kept[-1]


def _engines(folder: Path, name: str, ranks: int) -> Any:
    from rlhf_npu.config import ModelConfig
    from rlhf_npu.engines.models import load_policy
    from rlhf_npu.engines.trainer_engine import InferenceEngine
    from rlhf_npu.hybrid.resharding.reshard import Resharder

    rollout = _rollout(folder, name, ranks)
    model = ModelConfig(path=str(folder / name), dtype=FAMILIES[name].dtype)
    policy = load_policy(model).to(PLATFORM.device())
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(parameter))
    if ranks > 1:
        policy = InferenceEngine(policy, zero_stage=3, dtype=model.dtype, platform=PLATFORM).module.module
    return rollout, policy, Resharder(policy, rollout, bucket_bytes=20_000)


def _tensor(rollout: Any, part: str) -> torch.Tensor:
    return next(tensor.data for name, tensor in rollout.module.named_parameters() if part in name)


def _flip_a_bit(rollout: Any, base: Path) -> None:
    if torch.distributed.get_rank() == 0:
        bits = _tensor(rollout, "o_proj.weight").view(-1).view(torch.uint8)
        bits[4] ^= 1


def _forget_a_tensor(rollout: Any, base: Path) -> None:
    before = load_file(base / "model.safetensors")["model.norm.weight"]
    _tensor(rollout, "model.norm.weight").copy_(before)


def _exchange_shards(rollout: Any, base: Path) -> None:
    """Each rank has its neighbour's; alone, one half in the place of the other."""
    mine = _tensor(rollout, "qkv_proj.weight")
    ranks = torch.distributed.get_world_size()
    shards = [torch.empty_like(mine) for _ in range(ranks)]
    torch.distributed.all_gather(shards, mine)
    wrong = shards[(torch.distributed.get_rank() + 1) % ranks] if ranks > 1 else mine.flip(0)
    mine.copy_(wrong)


def _transpose(rollout: Any, base: Path) -> None:
    """An expert's matrix; of a dense model as much of one as is square."""
    experts = [tensor.data[0] for name, tensor in rollout.module.named_parameters() if "w13_weight" in name]
    matrix = experts[0] if experts else _tensor(rollout, "down_proj.weight")
    square = matrix[: min(matrix.shape), : min(matrix.shape)]
    square.copy_(square.T.clone())


def _exchange_experts(rollout: Any, base: Path) -> None:
    experts = [tensor.data for name, tensor in rollout.module.named_parameters() if "w2_weight" in name]
    matrices = experts[0] if experts else _tensor(rollout, "gate_up_proj.weight")
    matrices.copy_(matrices.flip(0))


def _load_the_base(rollout: Any, base: Path) -> None:
    weights = load_file(base / "model.safetensors", device=str(PLATFORM.device()))
    with rollout.updating_weights():
        rollout.load_weights(list(weights.items()))


MUTATIONS: dict[str, tuple[Callable[[Any, Path], None], str]] = {
    "a flipped bit": (_flip_a_bit, "o_proj.weight"),
    "a missed tensor": (_forget_a_tensor, "model.norm.weight"),
    "a swapped shard": (_exchange_shards, "qkv_proj.weight"),
    "a transposed matrix": (_transpose, ""),
    "experts or halves in each other's place": (_exchange_experts, ""),
    "the base weights over the trained ones": (_load_the_base, "qkv_proj.weight"),
}


def _complaint(act: Callable[[], Any]) -> str:
    from rlhf_npu.errors import ReshardError

    try:
        act()
    except ReshardError as error:
        return str(error)
    return "nothing"


@contextmanager
def _lost_buffer(rollout: Any) -> Iterator[None]:
    buffer = next(tensor for name, tensor in rollout.module.named_buffers() if "cos_sin_cache" in name)
    kept = buffer.clone()
    buffer.zero_()
    yield
    buffer.copy_(kept)


@contextmanager
def _a_byte_lost_on_the_way() -> Iterator[None]:
    """The collective of the first bucket brings one byte of the other rank's as another."""
    from rlhf_npu.hybrid.resharding import bucket_transfer

    gather = bucket_transfer._all_gather
    met: list[torch.Tensor] = []

    def losing(output: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        work = gather(output, *arguments, **named)
        if not met:
            work.wait()
            output[-1 - output.numel() // 2] ^= 4
        met.append(output)
        return work

    bucket_transfer._all_gather = losing
    try:
        yield
    finally:
        bucket_transfer._all_gather = gather


def _differences_to_a_fresh_engine(rollout: Any, policy: Any, folder: Path, name: str, ranks: int) -> list[str]:
    """What a new engine, which loads the saved policy, holds otherwise."""
    from rlhf_npu.config import ModelConfig
    from rlhf_npu.engines.models import load_tokenizer, save_policy
    from rlhf_npu.hybrid.resharding.gathered import whole_weights

    weights = whole_weights(policy, 20_000, keep=torch.distributed.get_rank() == 0)
    if weights:
        save_policy(policy, load_tokenizer(ModelConfig(path=str(folder / name))), weights, folder / "saved" / name)
    torch.distributed.barrier()
    fresh = _rollout(folder / "saved", name, ranks)
    held = dict(rollout.module.named_parameters()) | dict(rollout.module.named_buffers())
    loaded = dict(fresh.module.named_parameters()) | dict(fresh.module.named_buffers())
    assert held.keys() == loaded.keys()
    return [tensor for tensor in held if not torch.equal(held[tensor], loaded[tensor])]


@torch.no_grad()
def _mutate_each(folder: Path, names: tuple[str, ...], ranks: int) -> Any:
    complaints: dict[str, dict[str, str]] = {}
    for name in names:
        rollout, policy, resharder = _engines(folder, name, ranks)
        resharder.rehearse()
        said = complaints[name] = {"as it is": _complaint(resharder.verify)}
        for what, (mutate, _) in MUTATIONS.items():
            mutate(rollout, folder / name)
            said[what] = _complaint(resharder.verify)
            said[f"repaired after {what}"] = _complaint(resharder.reshard) + _complaint(resharder.verify)
        with _lost_buffer(rollout):
            said["a lost buffer"] = _complaint(resharder.reshard)
        if ranks > 1:
            with _a_byte_lost_on_the_way():
                said["on the way"] = _complaint(resharder.reshard)
        resharder.reshard()
        if DEVICE == "cpu":
            different = _differences_to_a_fresh_engine(rollout, policy, folder, name, ranks)
            said["as it is, compared to a fresh engine"] = ", ".join(different) or "nothing"
    return complaints


@pytest.mark.parametrize("names", GROUPS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_each_kind_of_stale_weights_is_named(tmp_path: Path, names: tuple[str, ...], ranks: int) -> None:
    for name in names:
        FAMILIES[name].save(tmp_path / name)
    by_rank = run_ranks(ranks, _mutate_each, tmp_path, names, ranks)
    for name in names:
        for complaints in (result[name] for result in by_rank):
            for what, said in complaints.items():
                fine = what.startswith(("as it is", "repaired"))
                assert (set(said.split("nothing")) == {""}) == fine, f"{name}: {what}: {said}"
        of_first = by_rank[0][name]
        for what, (_, tensor) in MUTATIONS.items():
            assert tensor in of_first[what], f"{name}: {what}: {of_first[what]}"
        assert "cos_sin_cache" in of_first["a lost buffer"]
