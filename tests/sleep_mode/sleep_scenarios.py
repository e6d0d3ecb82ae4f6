"""What must hold of one vLLM engine with sleep mode, whichever device it is on: run in a process of its own.

    python -m tests.sleep_mode.sleep_scenarios MODEL [--graphs] [--lora]

Prints a line of JSON a scenario: its name and, if it failed, why.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from allocator import SleepPool
from tests.devices import DEVICE

PROMPT = [1, 4, 13, 6, 14, 11, 13, 7] * 17  # more than a block of the KV cache: 128 tokens on an NPU
LORA_RANK = 4
CYCLES = 50
PRESERVED = "*embed_tokens*"


class Engine:
    """A vLLM engine in this process and what the scenarios ask of it."""

    def __init__(self, options: argparse.Namespace) -> None:
        from vllm import LLM

        self.model_path = options.model
        self.graphs: bool = options.graphs
        self.device: Any = {"cuda": torch.cuda, "npu": getattr(torch, "npu", None)}.get(DEVICE)
        self.used_before = self.used()
        self.captures = self.replays = 0
        if DEVICE != "cpu":
            self._count_graphs()
        self.llm = LLM(
            str(options.model),
            enable_sleep_mode=True,
            enable_lora=options.lora,
            max_lora_rank=8,
            max_model_len=192,
            max_num_seqs=4,  # few graphs to capture
            enforce_eager=not options.graphs,
            enable_prefix_caching=True,
            gpu_memory_utilization=0.3,
            seed=0,
            **options.settings,
        )
        worker = self.llm.llm_engine.model_executor.driver_worker
        self.model = worker.get_model()
        self.pool: SleepPool = worker.sleep_mode_backend.pool
        self.runner = worker.model_runner
        self.first = self.tokens()

    def _count_graphs(self) -> None:
        graph: Any = torch.cuda.CUDAGraph if DEVICE == "cuda" else self.device.NPUGraph
        capture, replay = graph.capture_begin, graph.replay

        def counted_capture(*arguments: Any, **named: Any) -> Any:
            self.captures += 1
            return capture(*arguments, **named)

        def counted_replay(*arguments: Any, **named: Any) -> Any:
            self.replays += 1
            return replay(*arguments, **named)

        graph.capture_begin, graph.replay = counted_capture, counted_replay

    def tokens(self, lora: Any = None, prompt: list[int] = PROMPT) -> list[int]:
        """What the engine says greedily."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
        self.last = self.llm.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False, lora_request=lora)[0]
        return list(self.last.outputs[0].token_ids)

    def reload(self) -> None:
        """Load the checkpoint again, in place."""
        self.llm.collective_rpc("reload_weights")

    def mapped(self) -> int:
        """Bytes on the device in the pool."""
        return sum(tag.mapped for tag in self.pool.stats().values())

    def used(self) -> int:
        """Bytes of device memory in use by the driver's count, or of this process by the operating system's."""
        if self.device is not None:
            free, total = self.device.mem_get_info()
            return total - free
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def caches(self) -> list[torch.Tensor]:
        """Each layer's KV cache; on an NPU keys and values have one each."""
        return [part for cache in self.runner.kv_caches for part in (cache if isinstance(cache, tuple) else (cache,))]

    def others(self) -> dict[str, torch.Tensor]:
        """Copies of the model's tensors that are no parameters: buffers, and what its modules hold as attributes."""
        parameters = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        found = dict(_tensors(self.model))
        kept = {name: one for name, one in found.items() if one.untyped_storage().data_ptr() not in parameters}
        return {name: one.clone() for name, one in kept.items() if ".kv_cache" not in name}


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, module in model.named_modules():
        yield from ((f"{name}.{key}", buffer) for key, buffer in module.named_buffers(recurse=False))
        for key, value in vars(module).items():
            parts = value if isinstance(value, (list, tuple)) else (value,)
            yield from ((f"{name}.{key}.{i}", part) for i, part in enumerate(parts) if isinstance(part, torch.Tensor))


def a_first_sleep_that_was_prepared_makes_no_host_memory(engine: Engine) -> None:
    assert engine.pool.stats()["weights"].host == 0
    engine.llm.collective_rpc("prepare_sleep")
    end = time.monotonic() + 30
    while (prepared := engine.pool.stats()["weights"].host) == 0 and time.monotonic() < end:
        time.sleep(0.01)
    engine.llm.sleep(level=1)
    asleep = engine.pool.stats()["weights"]
    assert asleep.sleep.copied > sum(parameter.nbytes for parameter in engine.model.parameters())
    assert asleep.host == prepared
    engine.llm.wake_up()
    assert engine.tokens() == engine.first


def level_1_gives_memory_back_and_the_text_stays(engine: Engine) -> None:
    weights = sum(parameter.nbytes for parameter in engine.model.parameters())
    for cache in engine.caches():
        cache[: len(cache) // 8].fill_(0)
    used, mapped = engine.used(), engine.mapped()
    assert mapped > weights
    engine.llm.sleep(level=1)
    assert engine.mapped() == 0
    if engine.device is not None:
        assert used - engine.used() >= mapped
    else:
        assert used - engine.used() > weights
    assert engine.pool.stats()["kv_cache"].host < 1 << 20
    engine.llm.wake_up()
    assert engine.tokens() == engine.first


def level_2_drops_the_parameters_and_keeps_all_the_rest(engine: Engine) -> None:
    others = engine.others()
    engine.llm.sleep(level=2)
    assert engine.mapped() == 0
    engine.llm.wake_up(tags=["weights"])
    kept = {name for name, one in engine.model.named_parameters() if one.float().abs().max() > 1e-6}
    assert all("embed_tokens" in name for name in kept), kept
    assert bool(kept) == bool(preserved(engine))
    assert others
    assert all(torch.equal(one, others[name]) for name, one in engine.others().items())
    engine.reload()
    engine.llm.wake_up(tags=["kv_cache"])
    assert engine.tokens() == engine.first


def preserved(engine: Engine) -> list[str]:
    """What the configuration keeps at level 2; vLLM 0.23 has no such setting."""
    return getattr(engine.llm.llm_engine.vllm_config.model_config, "sleep_preserve_parameter_names", [])


def weights_wake_without_the_cache(engine: Engine) -> None:
    before = {name: parameter.clone() for name, parameter in engine.model.named_parameters()}
    engine.llm.sleep(level=1)
    engine.llm.wake_up(tags=["weights"])
    assert all(torch.equal(parameter, before[name]) for name, parameter in engine.model.named_parameters())
    assert engine.pool.stats()["kv_cache"].mapped == 0
    assert engine.llm.llm_engine.is_sleeping()
    engine.llm.wake_up(tags=["kv_cache"])
    assert not engine.llm.llm_engine.is_sleeping()
    assert engine.tokens() == engine.first


def new_weights_after_level_2_are_the_ones_that_speak(engine: Engine) -> None:
    checkpoint = load_file(engine.model_path / "model.safetensors")
    other = {name: weight.flip(0) if weight.dim() == 2 else weight for name, weight in checkpoint.items()}
    engine.llm.sleep(level=2)
    engine.llm.wake_up(tags=["weights"])
    engine.runner.model.load_weights(other.items())
    engine.llm.wake_up(tags=["kv_cache"])
    said = engine.tokens()
    assert said != engine.first
    engine.llm.sleep(level=1)
    engine.llm.wake_up()
    assert engine.tokens() == said
    engine.runner.model.load_weights(checkpoint.items())
    engine.llm.reset_prefix_cache()
    assert engine.tokens() == engine.first


def the_prefix_cache_is_forgotten(engine: Engine) -> None:
    engine.tokens()
    assert engine.tokens() == engine.first
    assert engine.last.num_cached_tokens > 0
    engine.llm.sleep(level=1)
    engine.llm.wake_up()
    assert engine.tokens() == engine.first
    assert not engine.last.num_cached_tokens


def lora_adapters_stay_loaded(engine: Engine) -> None:
    from vllm.lora.request import LoRARequest

    lora = LoRARequest("adapter", 1, str(save_adapter(engine.model_path)))
    adapted = engine.tokens(lora)
    assert adapted != engine.first
    weights = [parameter.clone() for parameter in engine.model.parameters()]
    for level in (1, 2):
        engine.llm.sleep(level=level)
        engine.llm.wake_up(tags=["weights"])
        if level == 2:  # vLLM 0.23 cannot load weights into a model with adapters
            for parameter, weight in zip(engine.model.parameters(), weights, strict=True):
                parameter.data.copy_(weight)
        engine.llm.wake_up(tags=["kv_cache"])
        assert engine.llm.llm_engine.list_loras() == {1}
        assert engine.tokens(lora) == adapted
        assert engine.tokens() == engine.first


def save_adapter(model: Path) -> Path:
    """A LoRA adapter of the attention's output that changes what the model says."""
    folder = model.parent / "adapter"
    folder.mkdir(exist_ok=True)
    weight = load_file(model / "model.safetensors")["model.layers.0.self_attn.o_proj.weight"]
    outputs, inputs = weight.shape
    torch.manual_seed(1)
    prefix = "base_model.model.model.layers.0.self_attn.o_proj"
    shapes = {f"{prefix}.lora_A.weight": (LORA_RANK, inputs), f"{prefix}.lora_B.weight": (outputs, LORA_RANK)}
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": LORA_RANK, "lora_alpha": LORA_RANK, "target_modules": ["o_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def addresses_stay_and_nothing_is_captured_again(engine: Engine) -> None:
    def addresses() -> list[int]:
        return [parameter.data_ptr() for parameter in engine.model.parameters()]

    before, captures, replays = addresses(), engine.captures, engine.replays
    engine.llm.sleep(level=1)
    engine.llm.wake_up()
    assert engine.tokens() == engine.first
    assert addresses() == before
    assert engine.captures == captures
    if engine.graphs:
        assert captures > 0
        assert engine.replays > replays
    else:
        assert captures == replays == 0


def calls_that_are_wrong_change_nothing(engine: Engine) -> None:
    def refused(call: Callable[[], object]) -> str:
        try:
            call()
        except ValueError as error:
            return str(error)
        raise AssertionError("was not refused")

    assert "want 1 (offload weights) or 2 (drop them)" in refused(lambda: engine.llm.sleep(level=3))
    engine.llm.wake_up()
    engine.llm.sleep(level=1)
    engine.llm.sleep(level=1)
    assert "unknown tags ['wights']" in refused(lambda: engine.llm.wake_up(tags=["weights", "wights"]))
    assert engine.mapped() == 0
    engine.llm.wake_up()
    engine.llm.wake_up()
    assert engine.tokens() == engine.first


def many_cycles_of_random_levels_tags_and_reloads_say_the_same(engine: Engine) -> None:
    choose = random.Random(0)
    for _ in range(CYCLES):
        level = choose.choice((1, 2))
        engine.llm.sleep(level=level)
        if level == 2 or choose.random() < 0.5:
            engine.llm.wake_up(tags=["weights"])
            if level == 2 or choose.random() < 0.5:
                engine.reload()
            engine.llm.wake_up(tags=["kv_cache"])
        else:
            engine.llm.wake_up()
        assert engine.tokens() == engine.first
    assert set(engine.pool.stats()) == {"weights", "kv_cache"}


PLAIN = [
    a_first_sleep_that_was_prepared_makes_no_host_memory,
    level_1_gives_memory_back_and_the_text_stays,
    level_2_drops_the_parameters_and_keeps_all_the_rest,
    weights_wake_without_the_cache,
    new_weights_after_level_2_are_the_ones_that_speak,
    the_prefix_cache_is_forgotten,
    addresses_stay_and_nothing_is_captured_again,
    calls_that_are_wrong_change_nothing,
    many_cycles_of_random_levels_tags_and_reloads_say_the_same,
]
LORA = [lora_adapters_stay_loaded]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--graphs", action="store_true", help="CUDA or ACL graphs on")
    parser.add_argument("--lora", action="store_true", help="an engine with adapters, and their scenario")
    parser.add_argument("--settings", type=json.loads, default={}, help="further arguments of LLM, as JSON")
    options = parser.parse_args()
    engine = Engine(options)
    for scenario in LORA if options.lora else PLAIN:
        try:
            scenario(engine)
            error = None
        except Exception:  # noqa: BLE001  # reported by the test; the other scenarios run all the same
            error = traceback.format_exc()
        print(json.dumps({"scenario": scenario.__name__, "error": error}), flush=True)
    os._exit(0)  # an engine that failed asleep must not be freed


if __name__ == "__main__":
    main()
