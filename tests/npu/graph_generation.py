"""Run by test_graphs.py: `graph_generation.py MODEL OTHER SETTINGS [--graphs]`, SETTINGS as JSON.

Prints what one vLLM engine says greedily with the model's weights, after it slept, with OTHER's weights loaded in
place, and with the first weights again in parameters that were moved; how many graphs were captured and replayed until
each; and whether the parameters had their addresses until they were moved: as JSON on the last line.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tests.sleep_mode.sleep_scenarios import Engine

PROMPTS = [[1, 4, 13, 6, 14, 11, 13, 7] * 17, [1, 5, 6, 7, 8], [1, 9, 3]]  # so that batches have three sizes
TOKENS = (12, 6, 9)


def _generate(engine: Engine) -> list[list[int]]:
    from vllm import SamplingParams

    results = engine.llm.generate(
        [{"prompt_token_ids": prompt} for prompt in PROMPTS],
        [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False) for count in TOKENS],
        use_tqdm=False,
    )
    return [list(result.outputs[0].token_ids) for result in results]


def _load(engine: Engine, folder: Path) -> None:
    engine.runner.model.load_weights(load_file(folder / "model.safetensors").items())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("settings", type=json.loads)
    parser.add_argument("--graphs", action="store_true")
    options = parser.parse_args(namespace=argparse.Namespace(lora=False))
    engine = Engine(options)
    said: dict[str, Any] = {}
    counts: dict[str, tuple[int, int]] = {}

    def say(name: str) -> None:
        said[name] = _generate(engine)
        counts[name] = (engine.captures, engine.replays)

    addresses = [parameter.data_ptr() for parameter in engine.model.parameters()]
    say("first")
    engine.llm.sleep(level=1)
    engine.llm.wake_up()
    say("slept")
    engine.llm.sleep(level=2)
    engine.llm.wake_up(tags=["weights"])
    _load(engine, options.other)
    engine.llm.wake_up(tags=["kv_cache"])
    say("other")
    stayed = [parameter.data_ptr() for parameter in engine.model.parameters()] == addresses
    for parameter in engine.model.parameters():
        parameter.data = parameter.data.clone()
    _load(engine, options.model)
    engine.llm.reset_prefix_cache()
    say("moved")
    print(json.dumps({"said": said, "counts": counts, "stayed": stayed}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
