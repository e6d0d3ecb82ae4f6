"""Packed rows compute what each of their sequences computes alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForSequenceClassification

from rlhf_npu.config import ModelConfig
from rlhf_npu.data.packing import Completion, Example, PackedBatch, pack
from rlhf_npu.engines.models import load_policy
from rlhf_npu.engines.packed_attention import PackedAttention, check_packing, visibility
from rlhf_npu.engines.packed_model import PackedModel, PackedScores
from rlhf_npu.errors import ModelError
from rlhf_npu.platform import CPU, CUDA, NPU
from rlhf_npu.preflight.tiny_models import COMMON, FAMILIES, Family
from tests.devices import PLATFORM
from tests.ranks import run_ranks
from tests.tiny_model import save_tiny_model

DEVICE = torch.device("cpu")
VOCABULARY = 128
# A prompt's length and its completions'; windows of 16 are shorter than most sequences.
SHAPES = ((30, (9, 25)), (3, (40, 2)), (0, (20,)), (12, (8,)), (1, (1, 33)))
ELSE = "something else where sequences are packed"
Gradients = dict[str, torch.Tensor]


def _examples(vocabulary: int = VOCABULARY, shapes: Any = SHAPES, seed: int = 0) -> list[Example]:
    generator = np.random.default_rng(seed)

    def completion(size: int, prompt: int) -> Completion:
        mask = generator.random(size) < 0.7
        mask[0] &= prompt > 0
        return Completion(generator.integers(3, vocabulary, size), mask)

    return [
        Example(generator.integers(3, vocabulary, prompt), tuple(completion(size, prompt) for size in sizes))
        for prompt, sizes in shapes
    ]


def _policy(name: str, folder: Path, dtype: str = "float32", **arguments: Any) -> Any:
    family = FAMILIES[name]
    replace(family, arguments=family.arguments | arguments).save(folder)
    return load_policy(ModelConfig(path=str(folder), dtype=dtype))


def _sequences(examples: list[Example]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids (T,) of each sequence, and which of its tokens but the first are trained."""
    for example in examples:
        for completion in example.completions:
            ids = np.concatenate([example.prompt, completion.input_ids])
            trained = np.concatenate([np.zeros(len(example.prompt), dtype=bool), completion.mask])[1:]
            yield torch.from_numpy(ids), torch.from_numpy(trained)


def _alone(model: Any, examples: list[Example]) -> torch.Tensor:
    parts = []
    for ids, trained in _sequences(examples):
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].double()
        log_probs = logits - logits.logsumexp(-1, keepdim=True)
        parts.append(log_probs.gather(-1, ids[1:, None])[:, 0][trained])
    return torch.cat(parts)


def _weights(size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _gradients(values: torch.Tensor, model: torch.nn.Module) -> Gradients:
    """Gradients of a sum in which each value has a weight of its own."""
    model.zero_grad()
    (values.double() * _weights(len(values))).sum().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def _assert_close(some: Gradients, others: Gradients) -> None:
    assert some.keys() == others.keys()
    assert max(gradient.abs().max() for gradient in others.values()) > 1e-2
    for name, gradient in others.items():
        assert (some[name] - gradient).abs().max() <= 1e-5 * max(1.0, float(gradient.abs().max())), name


@pytest.mark.parametrize("name", FAMILIES)
def test_log_probs_and_gradients_are_those_of_each_sequence_alone(tmp_path: Path, name: str) -> None:
    examples, model = _examples(), _policy(name, tmp_path)
    expected = _alone(model, examples)
    expected_gradients = _gradients(expected, model)
    packed = PackedModel(model, platform=CPU).train()
    log_probs = packed(pack(examples, DEVICE), chunk=7)
    assert log_probs.dtype == torch.float32
    assert (log_probs - expected).abs().max() < 1e-5
    _assert_close(_gradients(log_probs, model), expected_gradients)
    check_packing(packed)


@pytest.mark.parametrize("name", ["Llama", "GPT-NeoX", "Qwen2", "Gemma 3"])
def test_scores_and_gradients_are_those_of_each_sequence_alone(tmp_path: Path, name: str) -> None:
    _policy(name, tmp_path)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    torch.nn.init.normal_(model.score.weight)
    examples = _examples()
    expected = torch.cat([model(input_ids=ids[None], use_cache=False).logits[0] for ids, _ in _sequences(examples)])
    expected_gradients = _gradients(expected, model)
    packed = PackedScores(model, platform=CPU)
    scores = packed(pack(examples, DEVICE))
    assert scores.shape == (8,)
    assert (scores - expected).abs().max() < 1e-5 * max(1.0, float(expected.detach().abs().max()))
    _assert_close(_gradients(scores, model), expected_gradients)
    check_packing(packed)


@pytest.mark.parametrize("chunk", [1, 5, 10_000])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_neither_chunks_nor_checkpoints_change_anything(tmp_path: Path, chunk: int, checkpointing: bool) -> None:
    examples, model = _examples(), _policy("Llama, tied", tmp_path)
    batch, packed = pack(examples, DEVICE), PackedModel(model, platform=CPU).train()
    expected = packed(batch)
    expected_gradients = _gradients(expected, model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    values = packed(batch, chunk)
    assert (values - expected).abs().max() < 1e-6
    _assert_close(_gradients(values, model), expected_gradients)


def test_a_row_that_trains_nothing_has_zero_gradients(tmp_path: Path) -> None:
    nothing = Completion(np.arange(5), np.zeros(5, dtype=bool))
    packed = PackedModel(_policy("Llama", tmp_path), platform=CPU)
    values = packed(pack([Example(np.arange(4), (nothing, nothing))], DEVICE))
    assert values.shape == (0,)
    gradients = _gradients(values, packed.model)
    assert len(gradients) == len(list(packed.model.parameters()))
    assert all(not gradient.any() for gradient in gradients.values())


@contextmanager
def _largest_tensors() -> Iterator[list[int]]:
    """Elements of each floating tensor that an operation returns, of forward and backward passes."""
    sizes: list[int] = []

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            results = function(*args, **(kwargs or {}))
            made = results if isinstance(results, tuple | list) else (results,)
            sizes.extend(one.numel() for one in made if isinstance(one, torch.Tensor) and one.is_floating_point())
            return results

    with Recording():
        yield sizes


@pytest.mark.parametrize("name", ["Llama", "Gemma 2"])
def test_no_tensor_of_tokens_times_vocabulary_exists(tmp_path: Path, name: str) -> None:
    vocabulary, tokens, chunk = 4096, 300, 16
    packed = PackedModel(_policy(name, tmp_path, vocab_size=vocabulary), platform=CPU)
    ids = np.arange(tokens)
    batch = pack([Example(ids[:1], (Completion(ids, np.ones(tokens, dtype=bool)),))], DEVICE)
    largest = {}
    for size in (chunk, tokens):
        with _largest_tensors() as sizes:
            packed(batch, size).sum().backward()
        largest[size] = max(sizes)
    assert largest[tokens] == tokens * vocabulary
    assert largest[chunk] <= max(64 * vocabulary, 4 * (tokens + 1) ** 2) < tokens * vocabulary / 3


def _visible(batch: PackedBatch, window: int | None) -> list[list[bool]]:
    segment, parent, position = batch.segment.tolist(), batch.parent.tolist(), batch.position_ids[0].tolist()

    def sees(query: int, key: int) -> bool:
        seen = segment[key] in (segment[query], parent[query])
        return key <= query and seen and (window is None or position[query] - position[key] < window)

    return [[sees(query, key) for key in range(len(segment))] for query in range(len(segment))]


@pytest.mark.parametrize("window", [None, 16])
def test_a_token_sees_its_own_segment_and_its_prompt(window: int | None) -> None:
    from torch.nn.attention.flex_attention import create_mask

    batch = pack(_examples(), DEVICE)
    tokens = len(batch.segment)
    visible = visibility(batch, window)
    places = torch.arange(tokens)
    dense = visible(None, None, places[:, None], places[None])
    assert dense.tolist() == _visible(batch, window)
    assert torch.equal(create_mask(visible, None, None, tokens, tokens, device="cpu")[0, 0], dense)


def test_variable_length_kernels_get_where_sequences_begin(tmp_path: Path) -> None:
    model = _policy("Llama", tmp_path, dtype="bfloat16")
    attention = PackedAttention(model, "auto", CPU, shares_prompts=False)
    attention.implementation = "flash_attention_2"
    apart = [Example(example.prompt, (one,)) for example in _examples() for one in example.completions]
    inputs = attention.inputs(pack(apart, DEVICE))
    lengths = [39, 55, 43, 5, 20, 20, 2, 34]
    assert inputs["cu_seq_lens_q"].tolist() == inputs["cu_seq_lens_k"].tolist() == [0, *np.cumsum(lengths)]
    assert inputs["cu_seq_lens_q"].dtype == torch.int32
    assert inputs["max_length_q"] == inputs["max_length_k"] == 55
    assert inputs["attention_mask"] is None
    with pytest.raises(ModelError, match="completions share a prompt"):
        attention.inputs(pack(_examples(), DEVICE))


@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "Gemma 3", "Qwen3-MoE"])
def test_bfloat16_passes_the_check(tmp_path: Path, name: str) -> None:
    check_packing(PackedModel(_policy(name, tmp_path, dtype="bfloat16"), platform=CPU))


def _save(folder: Path, config_class: str, **arguments: Any) -> Any:
    family = Family(config_class, config_class, COMMON | arguments)
    family.save(folder)
    return load_policy(ModelConfig(path=str(folder), dtype="float32"))


@pytest.mark.parametrize(
    ("config_class", "arguments", "words"),
    [
        ("MambaConfig", {"state_size": 4}, "layers of the kinds linear_attention"),
        ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}, "layers of the kinds conv"),
        ("BloomConfig", {"n_head": 4, "n_layer": 2}, "cannot compute packed sequences"),
        ("FalconConfig", {"alibi": True, "num_attention_heads": 2}, "cannot compute packed sequences"),
        ("HyperCLOVAXConfig", {"logits_scaling": 3.0}, ELSE),
    ],
)
def test_what_cannot_be_packed_is_refused(tmp_path: Path, config_class: str, arguments: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words) as refusal:
        check_packing(PackedModel(_save(tmp_path, config_class, **arguments), platform=CPU))
    assert str(tmp_path) in str(refusal.value)


def test_a_sequence_that_leaks_into_the_next_is_noticed(tmp_path: Path) -> None:
    packed = PackedModel(_policy("Llama", tmp_path), platform=CPU)
    packed.attention._windows = {"": 12}
    with pytest.raises(ModelError, match=ELSE):
        check_packing(packed)


def test_an_encoder_is_refused() -> None:
    config = transformers.T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ModelError, match="more than a decoder's attention"):
        PackedModel(transformers.T5ForConditionalGeneration(config), platform=CPU)


def test_reward_models_have_one_label(tmp_path: Path) -> None:
    _policy("Llama", tmp_path)
    with pytest.raises(ModelError, match="num_labels=2"):
        PackedScores(AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=2), platform=CPU)


def test_attention_that_is_asked_for_stays_or_is_refused(tmp_path: Path) -> None:
    model = _policy("Llama", tmp_path, dtype="bfloat16")
    assert PackedAttention(model, "auto", CPU, shares_prompts=True).implementation == "sdpa"
    assert PackedAttention(model, "auto", NPU, shares_prompts=True).implementation == "sdpa"
    assert PackedAttention(model, "auto", CUDA, shares_prompts=True).implementation == "flex_attention"
    model.set_attn_implementation("eager")
    assert PackedAttention(model, "eager", CUDA, shares_prompts=True).implementation == "eager"
    model.set_attn_implementation("flex_attention")
    assert PackedAttention(model, "flex_attention", CUDA, shares_prompts=True).implementation == "flex_attention"
    with pytest.raises(ModelError, match="on the CPU torch has no backward pass for it"):
        PackedAttention(model, "flex_attention", CPU, shares_prompts=True)
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ModelError, match="cannot let two completions share a prompt"):
        PackedAttention(model, "flash_attention_2", CUDA, shares_prompts=True)


def _of_rank(path: str, stages: tuple[int, ...], reference_path: str) -> list[tuple[Gradients, Gradients]]:
    """At each stage the gradients of the policy and of the reward model, of which each rank has a part of the rows."""
    return [(_policy_gradients(path, stage), _score_gradients(reference_path, stage)) for stage in stages]


def _parts() -> list[list[Example]]:
    """The examples of two ranks, of which one trains many more tokens."""
    examples = _examples(vocabulary=15)
    return [examples[:1], examples[1:]]


def _policy_gradients(path: str, stage: int) -> Gradients:
    model = load_policy(ModelConfig(path=path, dtype="float32", enable_gradient_checkpointing=True), zero_stage=stage)
    return _engine_gradients(PackedModel(model, platform=PLATFORM), stage, chunk=4)


def _score_gradients(path: str, stage: int) -> Gradients:
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
    return _engine_gradients(PackedScores(model, platform=PLATFORM), stage)


def _engine_gradients(packed: Any, stage: int, **arguments: Any) -> Gradients:
    import torch.distributed as dist
    from deepspeed.utils import safe_get_full_grad

    from rlhf_npu.config import OptimConfig
    from rlhf_npu.engines.trainer_engine import MicroLoss, TrainerEngine

    engine = TrainerEngine(
        packed,
        OptimConfig(lr=1e-3),
        zero_stage=stage,
        dtype="float32",
        grad_clip=1.0,
        optimizer_steps=1,
        platform=PLATFORM,
    )
    check_packing(engine.module)  # type: ignore[arg-type]

    def share(module: torch.nn.Module, batch: PackedBatch) -> MicroLoss:
        loss = module(batch, **arguments).square().sum()
        return MicroLoss(loss, {"loss": loss})

    # The second micro-batch trains nothing.
    nothing = Completion(np.arange(3, 7), np.zeros(4, dtype=bool))
    device, mine = PLATFORM.device(), _parts()[dist.get_rank()]
    micro_batches = [pack(mine, device)]
    if isinstance(packed, PackedModel):
        micro_batches.append(pack([Example(np.arange(3, 5), (nothing,))], device))
    engine.accumulate(micro_batches, share)
    gradients = {}
    for name, parameter in packed.model.named_parameters():
        gradient = parameter.grad if parameter.grad is not None else safe_get_full_grad(parameter)
        gradients[name] = gradient.cpu().clone()
    engine.close()
    return gradients


@pytest.mark.slow
def test_gradients_under_zero_on_two_ranks_are_those_of_one_process_unpacked(tmp_path: Path) -> None:
    path = str(save_tiny_model(tmp_path / "model", tied=True))
    policy = load_policy(ModelConfig(path=path, dtype="float32"))
    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
    classifier.save_pretrained(tmp_path / "classifier")
    examples = [example for part in _parts() for example in part]
    _alone(policy, examples).square().sum().backward()
    scores = [classifier(input_ids=ids[None], use_cache=False).logits[0] for ids, _ in _sequences(examples)]
    torch.cat(scores).square().sum().backward()
    expected = [
        {name: parameter.grad for name, parameter in model.named_parameters()} for model in (policy, classifier)
    ]
    for rank in run_ranks(2, _of_rank, path, (0, 1, 2, 3), str(tmp_path / "classifier")):
        for stage in rank:
            for found, wanted in zip(stage, expected, strict=True):
                _assert_close(found, wanted)
