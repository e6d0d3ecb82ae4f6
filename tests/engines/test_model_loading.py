"""Where the weights of a trainer's model are after loading, and how much memory it took on the way."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3MoeConfig

from rlhf_npu.config import ModelConfig
from rlhf_npu.preflight.tiny_models import FAMILIES
from tests.devices import PLATFORM
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow

MIB = 1 << 20
SHAPES = {"vocab_size": 1024, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
LARGE = {
    "dense": LlamaConfig(**SHAPES, intermediate_size=1536, num_hidden_layers=20),
    "mixture": Qwen3MoeConfig(**SHAPES, head_dim=64, moe_intermediate_size=64, num_experts=16, num_hidden_layers=32),
}


def _anonymous() -> int:
    """Bytes of this process that are no pages of a file."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


@contextmanager
def _peak() -> Iterator[list[int]]:
    """Within it anonymous memory is looked at again and again; then the list holds by how much it rose at most."""
    before, looks, over = _anonymous(), [0], threading.Event()

    def look() -> None:
        while not over.wait(0.001):
            looks.append(_anonymous() - before)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield looks
    finally:
        over.set()
        thread.join()
        looks[:] = [max(looks)]


@dataclass(frozen=True)
class _Folders:
    """Models, each with the precision to load it in."""

    large: list[tuple[str, str]]
    families: list[tuple[str, str]]
    critic: str


@dataclass(frozen=True)
class _Loads:
    """What one rank saw.

    Attributes:
        large: of each large model, by how many bytes memory rose at most, and the bytes of this rank's shards.
        families: of each model, the names of tensors that are not as transformers loads them.
        critics: a critic's tensors, loaded whole and in shards.
        devices: where the whole critic's parameters are.
    """

    large: list[tuple[int, int]]
    families: list[list[str]]
    critics: list[dict[str, torch.Tensor]]
    devices: set[torch.device]


def _load_all(folders: _Folders) -> _Loads:
    from rlhf_npu.engines.models import load_critic

    device, model = PLATFORM.device(), ModelConfig(path=folders.critic, dtype="float32")
    critics = [load_critic(model, zero_stage=stage, device=device) for stage in (0, 3)]
    return _Loads(
        large=[_load_large(path, dtype) for path, dtype in folders.large],  # after DeepSpeed's own memory was made
        families=[_unlike(path, dtype) for path, dtype in folders.families],
        critics=[_whole(critic) for critic in critics],
        devices={parameter.device for parameter in critics[0].parameters()},
    )


def _load_large(path: str, dtype: str) -> tuple[int, int]:
    from rlhf_npu.engines.models import load_policy

    gc.collect()
    PLATFORM.empty_cache()
    with _peak() as peak:
        policy = load_policy(ModelConfig(path=path, dtype=dtype), zero_stage=3, device=PLATFORM.device())
    parameters: list[Any] = list(policy.parameters())
    return peak[0], sum(parameter.ds_tensor.nbytes for parameter in parameters)


def _unlike(path: str, dtype: str) -> list[str]:
    from rlhf_npu.engines.models import load_policy

    policy = load_policy(ModelConfig(path=path, dtype=dtype), zero_stage=3, device=PLATFORM.device())
    assert all(hasattr(parameter, "ds_id") for parameter in policy.parameters())
    assert {tensor.device for tensor in policy.buffers()} <= {PLATFORM.device()}
    whole = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    expected, found = _tensors(whole), _whole(policy)
    tied = dict(policy.named_parameters()).keys() ^ dict(whole.named_parameters()).keys()
    differences = [name for name in expected if not torch.equal(found[name], expected[name])]
    return [*differences, *(found.keys() ^ expected.keys()), *tied]


def _whole(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        return {name: tensor.detach().cpu().clone() for name, tensor in _tensors(module).items()}


def _tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All parameters, tied ones under each name, and all buffers."""
    return dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers())


def _save_large(folder: Path, config: PreTrainedConfig) -> str:
    """Write a model of whatever was in memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.to_empty(device="cpu").save_pretrained(folder)
    return str(folder)


def _untied(folder: Path) -> str:
    """Let a checkpoint hold two embeddings that its configuration ties."""
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> _Folders:
    root = tmp_path_factory.mktemp("models")
    large = [(_save_large(root / name, config), "float32") for name, config in LARGE.items()]
    families = [(str(family.save(root / name)), family.dtype) for name, family in FAMILIES.items()]
    families.append((str(root / "Mixtral"), "bfloat16"))
    families.append((_untied(FAMILIES["Qwen3"].save(root / "untied")), "float32"))
    return _Folders([*large, (str(root / "dense"), "bfloat16")], families, str(root / "Qwen3-MoE"))


@pytest.fixture(scope="module")
def ranks(folders: _Folders) -> list[_Loads]:
    return run_ranks(2, _load_all, folders)


def test_two_ranks_under_zero_3_take_less_than_a_third_more_than_the_model(
    folders: _Folders, ranks: list[_Loads]
) -> None:
    """Weights that transformers joins, and those that are cast, too; an NPU's shards are not even in host memory."""
    for (path, dtype), *loads in zip(folders.large, *(rank.large for rank in ranks), strict=True):
        files = sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))
        copy = files // (2 if dtype == "bfloat16" else 1)
        assert copy > 120_000_000
        assert sum(shards for _, shards in loads) == pytest.approx(copy, rel=0.01)
        assert sum(peak for peak, _ in loads) < 1.3 * copy, (path, dtype, loads)


def test_shards_of_each_family_are_what_transformers_loads(folders: _Folders, ranks: list[_Loads]) -> None:
    for rank in ranks:
        unlike = zip(folders.families, rank.families, strict=True)
        assert [(folder, names) for folder, names in unlike if names] == []


def test_a_critic_is_the_model_with_a_head_of_zeros(folders: _Folders, ranks: list[_Loads]) -> None:
    trunk = AutoModelForCausalLM.from_pretrained(folders.critic).model.state_dict()
    for rank in ranks:
        whole, gathered = rank.critics
        assert rank.devices == {PLATFORM.device()}
        assert whole.keys() == gathered.keys()
        assert all(torch.equal(whole[name], gathered[name]) for name in whole)
        assert all(torch.equal(whole[f"trunk.{name}"], tensor) for name, tensor in trunk.items())
        assert not any(whole[name].any() for name in whole if name.startswith("value_head."))
