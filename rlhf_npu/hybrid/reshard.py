"""Move the trained weights into the rollout engine, bucket by bucket, and prove that they arrived."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from rlhf_npu.engines.rollout import RolloutEngine
from rlhf_npu.engines.tensor_bits import MODULUS, bits_sum
from rlhf_npu.errors import ReshardError
from rlhf_npu.hybrid.checkpoint_names import Named, as_in_checkpoint, check_convertible
from rlhf_npu.hybrid.checksum import rollout_checksum


@dataclass(frozen=True)
class ReshardReport:
    """One reshard: the version of the weights that the rollout now has, their checksum, bytes and buckets moved."""

    version: int
    checksum: int
    moved_bytes: int
    buckets: int


class Resharder:
    """Loads a trainer's parameters into the rollout engine of the same process.

    At most one bucket of gathered parameters lives beside the two models, and where vLLM transforms weights, one layer.

    Raises:
        ModelError: the policy's weights cannot be sent bucket by bucket.
    """

    def __init__(self, policy: PreTrainedModel, rollout: RolloutEngine, bucket_bytes: int) -> None:
        check_convertible(policy)
        self._policy = policy
        self._rollout = rollout
        self._bucket_bytes = bucket_bytes
        self.version = 0

    def reshard(self) -> ReshardReport:
        """Overwrite the rollout's weights in place; every rank calls this together.

        Raises:
            ReshardError: the rollout's weights are not the trainer's afterwards.
        """
        report = self._transfer(self.version + 1)
        self.version += 1
        return report

    def rehearse(self) -> None:
        """Reshard the weights that both engines began with: what will fail is to fail before anything was trained.

        The rollout's weights are zero before it, so that one that does not arrive cannot be taken for one that did.

        Raises:
            ReshardError: vLLM does not take all of them while it runs.
        """
        for parameter in self._rollout.module.parameters():
            parameter.data.zero_()
        try:
            self._transfer(self.version)
        except (AttributeError, KeyError, ValueError, RuntimeError, NotImplementedError) as error:
            raise ReshardError(
                f"models of type {self._policy.config.model_type!r} cannot be trained here: vLLM does not take new "
                f"weights of theirs while it runs ({type(error).__name__}: {error})"
            ) from error

    def _transfer(self, version: int) -> ReshardReport:
        sent = moved = buckets = 0
        with self._rollout.updating_weights():
            for bucket in gathered_buckets(self._policy, self._bucket_bytes):
                weights = as_in_checkpoint(self._policy, bucket)
                self._rollout.load_weights(weights)
                sent += sum(bits_sum(tensor) for _, tensor in weights)
                moved += sum(tensor.nbytes for _, tensor in weights)
                buckets += 1
        received = rollout_checksum(self._rollout.module, self._rollout.transformations.added)
        sent %= MODULUS
        if received != sent:
            raise ReshardError(
                f"reshard to version {version}: the trainer sent weights with checksum {sent:#x}, the rollout engine "
                f"holds {received:#x}; its generations would be stale"
            )
        return ReshardReport(version, sent, moved, buckets)


def gathered_buckets(policy: torch.nn.Module, bucket_bytes: int) -> Iterator[Named]:
    """The policy's whole weights in buckets of about `bucket_bytes`; valid until the next bucket is asked for.

    Under ZeRO-3 each bucket is gathered from all ranks, which therefore iterate together. Buffers that a checkpoint has
    (the bias of a router that is balanced without a loss) come first.
    """
    if buffers := _saved_buffers(policy):
        yield buffers
    for bucket in _cut(list(policy.named_parameters()), bucket_bytes):
        with _gathered([parameter for _, parameter in bucket]):
            yield [(name, parameter.detach()) for name, parameter in bucket]


def whole_weights(policy: torch.nn.Module, bucket_bytes: int, keep: bool) -> dict[str, torch.Tensor]:
    """Copies of all parameters in host memory, on ranks where `keep`; every rank calls this together."""
    weights: dict[str, torch.Tensor] = {}
    for bucket in gathered_buckets(policy, bucket_bytes):
        if keep:
            weights.update((name, tensor.to("cpu", copy=True)) for name, tensor in bucket)
    return weights


def _cut(parameters: list[tuple[str, torch.nn.Parameter]], bucket_bytes: int) -> Iterator[list]:
    bucket: list[tuple[str, torch.nn.Parameter]] = []
    size = 0
    for name, parameter in parameters:
        parameter_bytes = _numel(parameter) * parameter.element_size()
        if bucket and size + parameter_bytes > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, parameter))
        size += parameter_bytes
    yield bucket


def _saved_buffers(policy: torch.nn.Module) -> Named:
    saved = policy.state_dict().keys()
    return [(name, buffer) for name, buffer in policy.named_buffers() if name in saved]


def _numel(parameter: torch.nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _gathered(parameters: list[torch.nn.Parameter]) -> AbstractContextManager[None]:
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)
