from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_npu.algorithms import token_probs
from rlhf_npu.algorithms.token_probs import entropy_from_logits, log_probs_from_logits
from tests.algorithms.ragged import normal

SHAPES = [(1, 1, 2), (3, 5, 7), (2, 4, 50_000)]


@pytest.fixture(params=[1 << 24, 20])
def _chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One chunk for all, and chunks of one token."""
    monkeypatch.setattr(token_probs, "CHUNK_ELEMENTS", request.param)


def labels_for(logits: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, logits.shape[-1], logits.shape[:-1], generator=generator)


def reference_log_probs(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    return (logits / temperature).log_softmax(-1).gather(-1, labels[..., None])[..., 0]


def reference_entropy(logits: Tensor, temperature: float) -> Tensor:
    log_probs = (logits / temperature).log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_in_float64(shape: tuple[int, ...], temperature: float) -> None:
    logits = (4 * normal(0, *shape)).requires_grad_()
    labels, weights = labels_for(logits), normal(1, *shape[:-1])
    pairs = [
        (
            log_probs_from_logits(logits, labels, temperature),
            reference_log_probs(logits, labels, temperature),
        ),
        (entropy_from_logits(logits, temperature), reference_entropy(logits, temperature)),
    ]
    for ours, reference in pairs:
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
        gradients = [torch.autograd.grad((x * weights).sum(), logits)[0] for x in (ours, reference)]
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_logits_are_computed_in_float32(dtype: torch.dtype) -> None:
    logits = (10 * normal(0, 2, 3, 50_000)).to(dtype).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    labels = labels_for(logits)
    pairs = [
        (log_probs_from_logits(logits, labels), reference_log_probs(exact, labels, 1.0)),
        (entropy_from_logits(logits), reference_entropy(exact, 1.0)),
    ]
    for ours, reference in pairs:
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), reference, rtol=1e-6, atol=1e-5)
        gradient, expected = (
            torch.autograd.grad(x.sum(), inputs)[0] for x, inputs in ((ours, logits), (reference, exact))
        )
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, expected.to(dtype), rtol=1e-2, atol=1e-6)


def test_closed_forms() -> None:
    uniform = torch.zeros(1, 1, 8)
    assert float(entropy_from_logits(uniform, 0.5)) == pytest.approx(math.log(8))
    assert float(log_probs_from_logits(uniform, torch.tensor([[3]]), 0.5)) == pytest.approx(-math.log(8))
    shifted = log_probs_from_logits(torch.tensor([[[5e4, 5e4 - 2]]]), torch.tensor([[1]]))
    assert float(shifted) == pytest.approx(-math.log1p(math.exp(2)))


def test_a_token_that_cannot_be_sampled() -> None:
    """Rollouts mask tokens with -inf; entropy and gradients stay finite."""
    logits = torch.tensor([[[1.0, -math.inf, 2.0]]], requires_grad=True)
    entropy = entropy_from_logits(logits)
    log_prob = log_probs_from_logits(logits, torch.tensor([[0]]))
    (entropy.sum() + log_prob.sum()).backward()
    assert float(entropy.detach()) == pytest.approx(0.5822, abs=1e-4)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


class LargestTensor(TorchDispatchMode):
    """Remembers the most bytes that one new tensor took."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view:
            self.bytes = max(self.bytes, result.numel() * result.element_size())
        return result


def test_the_largest_tensor_is_the_gradient_in_the_logits_own_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_probs, "CHUNK_ELEMENTS", 4 * 4096)
    logits = torch.randn(4, 64, 4096).bfloat16().requires_grad_()
    labels = labels_for(logits)
    with LargestTensor() as largest:
        (log_probs_from_logits(logits, labels).sum() + entropy_from_logits(logits).sum()).backward()
    assert largest.bytes == logits.numel() * 2
