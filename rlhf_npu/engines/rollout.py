"""The vLLM rollout engine: generate, sleep, wake up, take new weights; in the trainer's process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rlhf_npu.config import DataConfig, ModelConfig, RolloutConfig
from rlhf_npu.engines.transformers_classes import own_classes
from rlhf_npu.errors import ConfigError, NoWeightsError
from rlhf_npu.platform import Platform
from rlhf_npu.sleep_mode.vllm_plugin import SWITCH, register
from rlhf_npu.sleep_mode.weight_update import updating_weights, watch_loading

GIB = 1 << 30
# Why the engine has no weights.
NEVER_SENT = "it did not read the model's weights, and none were sent to it"
DROPPED = "it slept at level 2, which drops them, and none were sent to it since"
SENT_IN_PART = "sending them failed, so it may hold a part of the new ones"
NPU_GRAPHS = "PIECEWISE"  # the only mode that was tested: in the others attention is in the graphs, and updated in them


@dataclass(frozen=True)
class Completion:
    """One response.

    Attributes:
        token_ids: the response's tokens; the last is a stop token when `finished`.
        log_probs: the sampling distribution's log-probability of each token, as the rollout engine saw it.
        finished: whether the response ended with a stop token; False when it met the length limit.
    """

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    finished: bool


class RolloutEngine:
    """A vLLM engine that shares its device, its process and its ranks with the trainer.

    Requires torch.distributed to be initialised and RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT to
    be set. Ranks are cut into replicas of `tensor_model_parallel_size` consecutive ranks; all ranks of a replica
    make the same calls with the same arguments and get the same completions.

    It generates only with weights: after `reads_weights=False`, after a sleep that drops them, and after a
    `receiving_weights` that failed, the next `receiving_weights` must come first.

    Args:
        kv_cache_bytes: of one device, where `rollout.gpu_memory_utilization` is "auto" and not vLLM decides.
        reads_weights: False leaves the model's weights unread; the trainer's are sent before anything else.
        lay_out: with unread weights, gives vLLM's parameters their memory, which is never to change afterwards.
    """

    def __init__(
        self,
        model: ModelConfig,
        rollout: RolloutConfig,
        data: DataConfig,
        platform: Platform,
        stop_token_ids: Sequence[int],
        *,
        kv_cache_bytes: int | None = None,
        reads_weights: bool = True,
        lay_out: Callable[[torch.nn.Module], None] | None = None,
    ) -> None:
        self._platform = platform
        self._stop_token_ids = list(stop_token_ids)
        self._temperature = rollout.temperature
        self._max_tokens = data.max_response_length
        self._lacks_weights = "" if reads_weights else NEVER_SENT
        with own_classes(), watch_loading() as self.transformations, _laid_out_by(lay_out):
            self.llm = _build_llm(model, rollout, data, platform, kv_cache_bytes, reads_weights)

    @property
    def module(self) -> Any:
        """This rank's shard of the model that generates: a vLLM module."""
        worker = self.llm.llm_engine.model_executor.driver_worker
        return worker.get_model()

    @property
    def attention(self) -> str:
        """The implementations of attention that it computes with, by vLLM's names."""
        layers = self.llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
        backends = {layer.get_attn_backend().get_name() for layer in layers if hasattr(layer, "get_attn_backend")}
        return ", ".join(sorted(backends))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        n: int,
        seed: int,
        temperature: float | None = None,
        max_tokens: int | None = None,
    ) -> list[list[Completion]]:
        """Sample `n` responses to each prompt.

        Args:
            prompts: token ids of each prompt.
            n: responses a prompt.
            seed: the same on every rank of a replica; fixes the responses.
            temperature: the configured one if None; 0 is greedy.
            max_tokens: of a response; the configured number if None.

        Raises:
            NoWeightsError: it would generate noise.
        """
        from vllm import SamplingParams

        self._require_weights("generate")
        sampling = SamplingParams(
            n=n,
            temperature=self._temperature if temperature is None else temperature,
            max_tokens=max_tokens or self._max_tokens,
            stop_token_ids=self._stop_token_ids,
            logprobs=0,
            detokenize=False,
        )
        inputs: Any = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        with _seeded(seed, self._platform):
            outputs = self.llm.generate(inputs, sampling, use_tqdm=False)
        return [[_completion(choice) for choice in output.outputs] for output in outputs]

    @property
    def longest_scored(self) -> int:
        """Tokens of a sequence that can be scored, at most: vLLM adds one."""
        return int(self.llm.llm_engine.model_config.max_model_len) - 1

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probability of each token of each sequence but its first, under the engine's weights.

        Sequences have at most `longest_scored` tokens.

        Raises:
            NoWeightsError: they would be scored by noise.
        """
        from vllm import SamplingParams

        self._require_weights("score")
        sampling = SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=0, detokenize=False)
        inputs: Any = [{"prompt_token_ids": list(sequence)} for sequence in sequences]
        outputs = self.llm.generate(inputs, sampling, use_tqdm=False)
        return [_prompt_log_probs(output) for output in outputs]

    def reset_prefix_cache(self) -> None:
        """Forget what was computed of earlier prompts."""
        self.llm.reset_prefix_cache()

    def sleep(self, level: int) -> None:
        """Give device memory back: level 1 offloads the weights, level 2 drops them; both drop the KV cache."""
        if level == 2:
            self._lacks_weights = self._lacks_weights or DROPPED
        executor = self.llm.llm_engine.model_executor
        if executor.sleeping_tags:  # vLLM 0.23 would do nothing, since a part of it sleeps
            executor.collective_rpc("sleep", kwargs={"level": level})
            executor.sleeping_tags |= {"weights", "kv_cache"}
        else:
            self.llm.sleep(level=level)

    def wake_up(self, tags: list[str]) -> None:
        """Take device memory for `tags` again: "weights", "kv_cache"."""
        self.llm.wake_up(tags)

    @contextmanager
    def receiving_weights(self) -> Iterator[None]:
        """Within it all weights are overwritten; until it ends without an error there is nothing to generate with."""
        self._lacks_weights = SENT_IN_PART
        yield
        self._lacks_weights = ""

    def updating_weights(self) -> AbstractContextManager[None]:
        """Within it, `load_weights` is called with one part of the weights after the other until all were given."""
        config = self.llm.llm_engine.vllm_config
        return updating_weights(config, self._platform.device(), self.transformations)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Overwrite parameters in place from (name in a checkpoint, full tensor) pairs; within `updating_weights`."""
        self.module.load_weights(weights)

    def shutdown(self) -> None:
        """Stop the engine and free what it holds."""
        self.llm.llm_engine.engine_core.shutdown()

    def _require_weights(self, what: str) -> None:
        if self._lacks_weights:
            raise NoWeightsError(
                f"the rollout engine cannot {what}: it has no weights, since {self._lacks_weights}; send the trainer's "
                "with Resharder.reshard, or others within receiving_weights"
            )


@contextmanager
def _seeded(seed: int, platform: Platform) -> Iterator[None]:
    """Seed what vLLM samples from: torch's generator, or numpy's, from which its model runner V2 seeds each request."""
    outer = np.random.get_state()  # noqa: NPY002  # the generator that vLLM draws from
    with platform.fork_rng():
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            np.random.set_state(outer)  # noqa: NPY002


def _build_llm(
    model: ModelConfig,
    rollout: RolloutConfig,
    data: DataConfig,
    platform: Platform,
    kv_cache_bytes: int | None,
    reads_weights: bool,
) -> Any:
    from vllm import LLM

    if not register():  # which vLLM does by itself, but only where this package's entry points are installed
        raise ConfigError(f"{SWITCH}=0 is set, and training puts the rollout to sleep in the sleep pool: unset it")
    if platform.name == "cpu":
        memory: dict[str, Any] = {"kv_cache_memory_bytes": int(rollout.kv_cache_memory_gb * GIB)}
    elif rollout.gpu_memory_utilization == "auto":
        memory = {"kv_cache_memory_bytes": kv_cache_bytes}
    else:
        memory = {"gpu_memory_utilization": rollout.gpu_memory_utilization}
    if platform.name == "npu" and not rollout.enforce_eager:
        memory["compilation_config"] = _npu_graphs()
    return LLM(
        model=model.path,
        load_format="auto" if reads_weights else _unread(),
        dtype=model.dtype,
        enable_sleep_mode=True,
        skip_tokenizer_init=True,  # prompts and responses are token ids
        trust_remote_code=model.trust_remote_code,
        distributed_executor_backend="external_launcher",
        tensor_parallel_size=rollout.tensor_model_parallel_size,
        disable_custom_all_reduce=True,  # it maps the other ranks' devices, and each worker sees only its own
        max_model_len=data.max_prompt_length + data.max_response_length,
        max_num_seqs=rollout.max_num_seqs,
        enforce_eager=rollout.enforce_eager,
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
        disable_log_stats=True,
        seed=0,
        **memory,
    )


def _unread() -> str:
    from rlhf_npu.engines.unread_weights import register_unread

    return register_unread()


def _laid_out_by(lay_out: Callable[[torch.nn.Module], None] | None) -> AbstractContextManager[None]:
    from rlhf_npu.engines.unread_weights import laid_out_by

    return laid_out_by(lay_out)


def _npu_graphs() -> dict[str, str]:
    return {"cudagraph_mode": NPU_GRAPHS}


def _completion(choice: Any) -> Completion:
    log_probs = tuple(step[token].logprob for token, step in zip(choice.token_ids, choice.logprobs, strict=True))
    return Completion(tuple(choice.token_ids), log_probs, finished=choice.finish_reason == "stop")


def _prompt_log_probs(output: Any) -> list[float]:
    steps = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    return [step[token].logprob for token, step in steps]
