"""Run by test_model_operators.py: `vllm_generation.py FOLDER ARGUMENTS PROMPTS SAMPLING [ADAPTER]`, all but the folders
as JSON. Prints the tokens of each prompt, their log-probabilities, how many tokens of it were cached, and the operators
that were called, as JSON on the last line."""

import json
import os
import sys
from typing import Any

os.environ |= {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": str(20000 + os.getpid() % 10000),
    "HF_HUB_OFFLINE": "1",
    "TASK_QUEUE_ENABLE": "1",
    "VLLM_ASCEND_ENABLE_NZ": "0",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "RLHF_NPU_SLEEP_MODE": "0",
}

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def main(
    folder: str, arguments: dict[str, Any], prompts: list[list[int]], sampling: dict[str, Any], *adapter: str
) -> None:
    """Generates for each prompt twice: what the first time computed is in the cache the second time."""
    engine = LLM(
        model=folder,
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_num_seqs=4,
        kv_cache_memory_bytes=64 << 20,
        seed=0,
        generation_config="vllm",
        logprobs_mode="processed_logprobs",
        distributed_executor_backend="external_launcher",
        **arguments,
    )
    rounds = []
    for _ in range(2):
        results = engine.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            SamplingParams(logprobs=0, detokenize=False, ignore_eos=True, **sampling),
            use_tqdm=False,
            lora_request=LoRARequest("adapter", 1, adapter[0]) if adapter else None,
        )
        rounds.append(
            {
                "tokens": [list(result.outputs[0].token_ids) for result in results],
                "logprobs": [
                    [scores[token].logprob for token, scores in zip(o.token_ids, o.logprobs, strict=True)]
                    for o in (result.outputs[0] for result in results)
                ],
                "cached": [result.num_cached_tokens for result in results],
            }
        )
    from simulated_npu.references import CALLS

    print(json.dumps({"rounds": rounds, "calls": CALLS}))


if __name__ == "__main__":
    main(sys.argv[1], *(json.loads(argument) for argument in sys.argv[2:5]), *sys.argv[5:])
