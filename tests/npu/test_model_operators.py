"""Models of random weights whose operators are the references: vLLM on the NPU against transformers on the CPU."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf_npu.preflight.tiny_models import FAMILIES

SCRIPT = Path(__file__).with_name("vllm_generation.py")
GENERATOR = torch.Generator().manual_seed(1)
LONG = torch.randint(3, 128, (150,), generator=GENERATOR).tolist()
PROMPTS = [[5, 6, 7, 8], [*LONG, 5, 6], [*LONG, 9]]
# A block of the cache has 128 tokens, and no prompt longer than 64 is computed at once.
ENGINE = {"max_model_len": 256, "max_num_batched_tokens": 64, "enable_prefix_caching": True}
GREEDY = {"temperature": 0.0, "max_tokens": 8}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 8, 16

pytestmark = pytest.mark.slow


def generated(
    folder: Path, arguments: dict[str, Any], sampling: dict[str, Any], adapter: Path | None = None
) -> dict[str, Any]:
    command = [sys.executable, str(SCRIPT), str(folder)]
    command += [json.dumps(value) for value in (ENGINE | arguments, PROMPTS, sampling)]
    ran = subprocess.run(
        command + ([str(adapter)] if adapter else []), capture_output=True, text=True, timeout=280, check=False
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    result: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return result


def scores(model: Any, prompt: list[int], tokens: list[int]) -> Tensor:
    """Log-probabilities of all ids for each of the tokens, by transformers: [tokens, ids]."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    result: Tensor = logits.float().log_softmax(-1)
    return result


def largest_difference(model: Any, result: dict[str, Any]) -> float:
    differences = []
    for prompt, tokens, logprobs in zip(PROMPTS, result["tokens"], result["logprobs"], strict=True):
        theirs = scores(model, prompt, tokens).gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        differences.append(float((theirs - torch.tensor(logprobs)).abs().max()))
    return max(differences)


@pytest.mark.parametrize(
    ("family", "operator"),
    [("Qwen3", "npu::npu_fused_infer_attention_score"), ("Qwen3-MoE", "npu::npu_grouped_matmul")],
)
def test_tokens_and_their_probabilities_are_those_of_transformers(tmp_path: Path, family: str, operator: str) -> None:
    FAMILIES[family].save(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    result = generated(tmp_path, {"dtype": "float32"}, GREEDY)
    for this in result["rounds"]:
        for prompt, tokens in zip(PROMPTS, this["tokens"], strict=True):
            assert scores(model, prompt, tokens).argmax(-1).tolist() == tokens
        assert largest_difference(model, this) < 1e-5
    assert result["rounds"][1]["cached"] == [0, 128, 128]
    assert result["calls"][operator] > 0


def test_what_is_drawn_depends_on_the_seed_alone_and_keeps_within_the_largest(tmp_path: Path) -> None:
    FAMILIES["Qwen2"].save(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    sampling = {"temperature": 1.0, "max_tokens": 8, "seed": 3, "top_k": 4, "top_p": 0.9}
    # Prompts at once: vLLM takes back what a part of a prompt drew by an offset that is that of CUDA.
    arguments = {"dtype": "float32", "max_num_batched_tokens": 512}
    first, second = generated(tmp_path, arguments, sampling)["rounds"]
    assert first["tokens"] == second["tokens"]
    for prompt, tokens in zip(PROMPTS, first["tokens"], strict=True):
        best = scores(model, prompt, tokens).topk(4, -1).indices
        assert all(token in row for token, row in zip(tokens, best.tolist(), strict=True))


def _adapter(folder: Path, model: Any) -> Path:
    """Writes an adapter of random matrices, and adds it to the model."""
    torch.manual_seed(3)
    weights = {}
    for name, module in model.named_modules():
        if name.endswith(PROJECTIONS):
            down = (0.2 * torch.randn(RANK, module.in_features)).bfloat16()
            up = (0.2 * torch.randn(module.out_features, RANK)).bfloat16()
            weights[f"base_model.model.{name}.lora_A.weight"] = down
            weights[f"base_model.model.{name}.lora_B.weight"] = up
            module.weight.data += ALPHA / RANK * up.float() @ down.float()
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": PROJECTIONS, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_an_adapter_counts_as_if_it_were_in_the_weights(tmp_path: Path) -> None:
    FAMILIES["Llama"].save(tmp_path / "model")
    base, merged = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16).float() for _ in "ab"
    )
    adapter = _adapter(tmp_path / "adapter", merged)
    arguments = {"dtype": "bfloat16", "enable_lora": True, "max_lora_rank": RANK}
    result = generated(tmp_path / "model", arguments, GREEDY, adapter)
    for this in result["rounds"]:
        assert largest_difference(merged.eval(), this) < 0.2 < 1 < largest_difference(base.eval(), this)
    assert result["calls"]["_C_ascend::sgmv_shrink"] > 0
    assert result["calls"]["_C_ascend::bgmv_expand"] > 0
