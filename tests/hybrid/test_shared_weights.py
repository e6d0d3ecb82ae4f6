"""Trainer and rollout that share their weights do what those do that copy them, bit for bit; what strays is found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_npu.preflight.tiny_models import FAMILIES
from tests.devices import DEVICE, PLATFORM
from tests.ranks import run_ranks
from tests.tiny_model import save_tiny_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(DEVICE != "cpu", reason="one process has several engines; other devices were not tried yet"),
]

RANKS = 2
STEPS = 2
PROMPTS = [[1, 4, 13, 6, 14, 11, 13, 7], [1, 5, 5, 9]]
PADDED = "padded vocabulary"  # a Llama of 15 tokens, for which vLLM has 64 rows
# bfloat16 at ZeRO 0 is refused by the configuration.
CASES = [(PADDED, "float32", 0), ("Qwen2", "bfloat16", 1), ("Qwen3", "bfloat16", 2)]
_kept: list[Any] = []  # the end of an engine takes the process group from all others


@dataclass
class Engines:
    """What one rank has; `storage` is None where weights are copied."""

    hybrid: Any
    rollout: Any
    trainer: Any
    resharder: Any
    sharing: Any
    storage: Any


def _engines(folder: Path, dtype: str, zero_stage: int, share: bool) -> Engines:
    from transformers import AutoModelForCausalLM

    from rlhf_npu.config import DataConfig, ModelConfig, OptimConfig, RolloutConfig
    from rlhf_npu.engines.model_fit import POLICY, build_skeleton
    from rlhf_npu.engines.models import load_policy
    from rlhf_npu.engines.rollout import RolloutEngine
    from rlhf_npu.engines.trainer_engine import TrainerEngine
    from rlhf_npu.hybrid.engine import HybridEngine
    from rlhf_npu.hybrid.resharding.reshard import Resharder
    from rlhf_npu.hybrid.resharding.shared_layout import WeightSharing
    from rlhf_npu.hybrid.switch_plan import Policy, Stage, plan_switches
    from rlhf_npu.hybrid.tags import ROLLOUT_TAGS, SHARED_TAG, make_tags

    data = DataConfig(train_files=["x"], val_files=[], train_batch_size=1, max_prompt_length=16, max_response_length=8)
    model = ModelConfig(path=str(folder), dtype=dtype)
    config = RolloutConfig(
        n=1, kv_cache_memory_gb=0.01, gpu_memory_utilization=0.02, log_prob_micro_batch_size_per_device=1
    )
    skeleton = build_skeleton(model, POLICY, AutoModelForCausalLM).module
    sharing = WeightSharing(skeleton, getattr(torch, dtype), RANKS, SHARED_TAG) if share else None
    lay_out = sharing.lay_out if sharing else None
    rollout = RolloutEngine(model, config, data, PLATFORM, [2], reads_weights=False, lay_out=lay_out)
    storage = sharing.storage_of(rollout) if sharing else None
    rollout.sleep(level=2)
    trainer = TrainerEngine(
        load_policy(model, device=PLATFORM.device()),
        OptimConfig(lr=1e-2),
        zero_stage=zero_stage,
        dtype=dtype,
        grad_clip=1e9,  # which clips nothing: a norm is rounded by the order of what it is made of
        optimizer_steps=1000,
        platform=PLATFORM,
        role="actor",
        storage=storage,
    )
    tags = make_tags(dict.fromkeys((*ROLLOUT_TAGS, *trainer.tags), 1 << 20), "2", storage is not None)
    cycle = [Stage.GENERATE, Stage.LOG_PROB, Stage.REF, Stage.TRAIN_ACTOR, Stage.RESHARD]
    plan = plan_switches(tags, cycle, {}, 1 << 40, Policy.OFFLOAD)
    resharder = Resharder(trainer.module, rollout, 20_000, storage)
    hybrid = HybridEngine(rollout, resharder, {"actor": trainer}, plan, PLATFORM)
    _kept.append(rollout)
    return Engines(hybrid, rollout, trainer, resharder, sharing, storage)


def _train(trainer: Any, step: int) -> float:
    from tensordict import TensorDict

    from rlhf_npu.algorithms.token_probs import log_probs_from_logits
    from rlhf_npu.engines.trainer_engine import MicroLoss

    def likelihood(module: torch.nn.Module, batch: TensorDict) -> MicroLoss:
        ids = batch["ids"]
        loss = -log_probs_from_logits(module(input_ids=ids, use_cache=False).logits[:, :-1], ids[:, 1:]).mean()
        return MicroLoss(loss, {"loss": loss})

    generator = torch.Generator().manual_seed(10 * step + torch.distributed.get_rank())
    ids = torch.randint(3, 15, (2, 12), generator=generator).to(PLATFORM.device())
    batch = TensorDict({"ids": ids}, batch_size=[2])
    return float(trainer.train_mini_batch(batch.split(1), likelihood)["loss"])


def _addresses(rollout: Any) -> list[int]:
    return [parameter.data_ptr() for parameter in rollout.module.parameters()]


def _steps(engines: Engines) -> tuple[list[Any], list[Any]]:
    """What every step gives, which must not depend on sharing; and the reshards' reports."""
    from rlhf_npu.hybrid.switch_plan import Stage

    engines.hybrid.rehearse_reshard()
    results, reports = [], []
    before = _addresses(engines.rollout)
    for step in range(STEPS + 1):
        reports.append(engines.hybrid.enter(Stage.RESHARD).reshard)
        engines.resharder.verify()
        engines.hybrid.enter(Stage.GENERATE)
        responses = engines.rollout.generate(PROMPTS, n=2, seed=step)
        scores = engines.rollout.score(PROMPTS)
        engines.hybrid.enter(Stage.REF)  # all of it sleeps, and the rollout drops what it has alone
        engines.hybrid.enter(Stage.TRAIN_ACTOR)
        results.append((responses, scores, _train(engines.trainer, step)))
    assert _addresses(engines.rollout) == before
    return results, reports


def _run(folder: Path, share: bool) -> Any:
    from rlhf_npu.hybrid.switch_plan import Stage

    seen = []
    for name, dtype, zero_stage in CASES:
        engines = _engines(folder / name, dtype, zero_stage, share)
        results, reports = _steps(engines)
        apart = engines.sharing.layout.apart if engines.sharing else {}
        seen.append((results, reports, apart, _mutations(engines) if share else {}))
        engines.hybrid.enter(Stage.TRAIN_ACTOR)  # the next trainer's states are made under the same tags
    return seen


def _complaint(act: Callable[[], Any]) -> str:
    from rlhf_npu.errors import RlhfNpuError

    try:
        act()
    except RlhfNpuError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _mutations(engines: Engines) -> dict[str, str]:
    """What is said if something is not shared that is said to be."""
    from rlhf_npu.hybrid.resharding.reshard import Resharder
    from rlhf_npu.hybrid.switch_plan import Stage

    engines.hybrid.enter(Stage.RESHARD)
    held = next(p for name, p in engines.rollout.module.named_parameters() if "o_proj.weight" in name)
    trained = engines.trainer.module.model.layers[0].mlp.down_proj.weight
    said = {}
    for who, parameter in (("rollout", held), ("trainer", trained)):
        memory = parameter.data
        parameter.data = memory.clone()
        said[who] = _complaint(engines.resharder.reshard)
        said[f"{who}, verified"] = _complaint(engines.resharder.verify)
        parameter.data = memory
    said["as it was"] = _complaint(engines.resharder.reshard)
    believing = replace(engines.storage, tensors={**engines.storage.tensors, "lm_head.weight": ("lm_head.weight",)})
    believing = believing if "lm_head.weight" in engines.storage.starts else engines.storage
    said["believed"] = _complaint(Resharder(engines.trainer.module, engines.rollout, 20_000, believing).reshard)
    engines.rollout.transformations.transformed.append(engines.rollout.module.model.layers[1].mlp.gate_up_proj)
    said["transformed"] = _complaint(lambda: engines.sharing.storage_of(engines.rollout))
    return said


def test_runs_that_share_and_runs_that_copy_are_the_same(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / PADDED)
    for name, _, _ in CASES:
        if name != PADDED:
            FAMILIES[name].save(tmp_path / name)
    shared = run_ranks(RANKS, _run, tmp_path, True)
    copied = run_ranks(RANKS, _run, tmp_path, False)
    for mine, theirs in zip(shared, copied, strict=True):
        for case, (results, reports, apart, said), (expected, copies, _, _) in zip(CASES, mine, theirs, strict=True):
            assert results == expected, case
            assert results[0][:2] != results[-1][:2], "training changed nothing"
            assert [report.version for report in reports] == [report.version for report in copies]
            _check_what_is_apart(case[0], reports, copies, apart)
            _check_what_is_said(case[0], said)


def _check_what_is_apart(name: str, reports: list[Any], copies: list[Any], apart: dict[str, str]) -> None:
    assert copies[-1].moved_bytes > 50_000
    if name != PADDED:
        assert apart == {}
        assert reports[-1].moved_bytes == 0
        return
    padding = "vLLM fills 3136 of its 4096 elements itself"
    assert apart == {"model.embed_tokens.weight": padding, "lm_head.weight": padding}
    assert reports[-1].moved_bytes == 2 * 15 * 64 * 4


def _check_what_is_said(name: str, said: dict[str, str]) -> None:
    for who in ("rollout", "rollout, verified"):
        assert "model.layers.0.self_attn.o_proj.weight has left the storage that it shares with the tr" in said[who]
    for who in ("trainer", "trainer, verified"):
        assert "the trainer's model.layers.0.mlp.down_proj.weight has left the storage that it shares" in said[who]
    assert said["as it was"] == "no error"
    if name == PADDED:
        assert "SharingError" in said["believed"]
        assert "elsewhere than to where they are shared: lm_head.weight" in said["believed"]
    else:
        assert said["believed"] == "no error"
    assert "SharingError: vLLM transforms model.layers.1.mlp.gate_up_proj after loading" in said["transformed"]
