"""An offline batch's gradient depends neither on packing, nor on the cut, nor on ranks, and is the formula's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_npu.config import ModelConfig, OptimConfig, PreferenceLossConfig, RewardLossConfig
from rlhf_npu.data.packing import Completion, Example, pack
from tests.devices import PLATFORM
from tests.ranks import run_ranks
from tests.tiny_model import save_tiny_model

pytestmark = pytest.mark.slow

EXAMPLES, BETA = 8, 0.3
OBJECTIVES = ("sft", "dpo", "reward")
CUTS = ([[0, 1, 2, 3, 4, 5, 6, 7]], [[0, 1, 2], [3], [4, 5, 6, 7]])
CUTS_OF_TWO = ([[0, 5], [2, 7]], [[1, 4], [3, 6]])
Gradients = dict[str, torch.Tensor]


def examples(completions: int) -> list[Example]:
    """Ragged prompts and completions; some tokens inside of them are not trained."""
    rng = np.random.default_rng(5)

    def completion() -> Completion:
        size = int(rng.integers(2, 7))
        return Completion(rng.integers(3, 15, size), np.append(rng.random(size - 1) < 0.8, True))

    return [
        Example(rng.integers(3, 15, int(rng.integers(1, 6))), tuple(completion() for _ in range(completions)))
        for _ in range(EXAMPLES)
    ]


REFERENCE = torch.linspace(-9, -4, 2 * EXAMPLES).reshape(EXAMPLES, 2)
MARGINS = torch.linspace(0, 1, EXAMPLES)


def _gradients(path: str, cuts_by_rank: Sequence[Sequence[list[list[int]]]], stages: Sequence[int]) -> Any:
    import torch.distributed as dist

    cuts = cuts_by_rank[dist.get_rank()]
    return {name: [_of(name, path, cut, stage) for stage in stages for cut in cuts] for name in OBJECTIVES}


def _of(name: str, path: str, cut: list[list[int]], stage: int) -> Gradients:
    from deepspeed.utils import safe_get_full_grad

    from rlhf_npu.engines.models import load_policy, load_reward_model
    from rlhf_npu.engines.packed_model import PackedModel, PackedScores
    from rlhf_npu.engines.trainer_engine import TrainerEngine
    from rlhf_npu.roles.objectives import bradley_terry, likelihood, pairs
    from rlhf_npu.roles.offline_batch import OfflineBatch, OfflineTotals

    config = ModelConfig(path=path, dtype="float32")
    torch.manual_seed(1)
    model = PackedScores(load_reward_model(config)) if name == "reward" else PackedModel(load_policy(config))
    objective = {
        "sft": likelihood,
        "dpo": pairs(PreferenceLossConfig(beta=BETA)),
        "reward": bradley_terry(RewardLossConfig()),
    }[name]
    optim = OptimConfig(lr=1e-3)
    engine = TrainerEngine(
        model, optim, zero_stage=stage, dtype="float32", grad_clip=1.0, optimizer_steps=9, platform=PLATFORM
    )
    data = examples(1 if name == "sft" else 2)
    trained = sum(int(completion.mask.sum()) for example in data for completion in example.completions)
    device = PLATFORM.device()
    batches = [
        OfflineBatch(
            packed=pack([data[index] for index in indices], device),
            totals=OfflineTotals(EXAMPLES, trained),
            reference=REFERENCE[indices].flatten().to(device) if name == "dpo" else None,
            margins=MARGINS[indices].to(device) if name == "reward" else None,
        )
        for indices in cut
    ]
    engine.accumulate(batches, objective)
    found = {}
    for key, parameter in model.model.named_parameters():
        gradient = parameter.grad if parameter.grad is not None else safe_get_full_grad(parameter)
        if gradient is not None:  # the vocabulary head of a reward model has none
            found[key] = gradient.cpu().double()
    engine.close()
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    path = str(save_tiny_model(tmp_path_factory.mktemp("models") / "model"))
    alone = run_ranks(1, _gradients, path, [CUTS], [0])
    return [path, alone, run_ranks(2, _gradients, path, [[cut] for cut in CUTS_OF_TWO], [0, 2, 3])]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_depend_neither_on_the_cut_nor_on_ranks_nor_on_the_stage(name: str, found: list[Any]) -> None:
    whole, *others = found[1][0][name] + found[2][0][name] + found[2][1][name]
    assert len(others) == 7
    for other in others:
        assert other.keys() == whole.keys()
        for key, gradient in whole.items():
            torch.testing.assert_close(other[key], gradient, rtol=1e-5, atol=5e-7)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_are_those_of_the_formula_on_each_sequence_alone(name: str, found: list[Any]) -> None:
    model, loss = {"sft": _sft, "dpo": _dpo, "reward": _reward}[name](found[0])
    loss.backward()
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[1][0][name][0][key], parameter.grad.double(), rtol=1e-4, atol=1e-6)


def _sft(path: str) -> tuple[torch.nn.Module, torch.Tensor]:
    model, score = _policy(path)
    data = examples(1)
    trained = sum(int(example.completions[0].mask.sum()) for example in data)
    return model, -torch.stack([score(example, 0) for example in data]).sum() / trained


def _dpo(path: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """Rafailov et al. 2023, equation 7."""
    model, score = _policy(path)
    losses = []
    for index, example in enumerate(examples(2)):
        ratios = [score(example, side) - REFERENCE[index, side].double() for side in (0, 1)]
        losses.append(-torch.log(torch.sigmoid(BETA * (ratios[0] - ratios[1]))))
    return model, torch.stack(losses).mean()


def _reward(path: str) -> tuple[torch.nn.Module, torch.Tensor]:
    from rlhf_npu.engines.models import load_reward_model

    torch.manual_seed(1)
    model = load_reward_model(ModelConfig(path=path, dtype="float32")).double()
    losses = []
    for index, example in enumerate(examples(2)):
        chosen, rejected = (model(_ids(example, side)).logits[0, 0] for side in (0, 1))
        losses.append(-torch.log(torch.sigmoid(chosen - rejected - MARGINS[index])))
    return model, torch.stack(losses).mean()


def _policy(path: str) -> tuple[torch.nn.Module, Callable[[Example, int], torch.Tensor]]:
    from rlhf_npu.engines.models import load_policy

    model = load_policy(ModelConfig(path=path, dtype="float32")).double()

    def score(example: Example, side: int) -> torch.Tensor:
        ids = _ids(example, side)
        probabilities = torch.softmax(model(ids, use_cache=False).logits[0], -1)
        first = len(example.prompt)
        trained = example.completions[side].mask
        return torch.stack(
            [
                torch.log(probabilities[first - 1 + place, int(ids[0, first + place])])
                for place in np.flatnonzero(trained).tolist()
            ]
        ).sum()

    return model, score


def _ids(example: Example, side: int) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([example.prompt, example.completions[side].input_ids]))[None]
