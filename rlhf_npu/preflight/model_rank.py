"""One rank of a trial of a model; see `model_trial`."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from rlhf_npu.config import DataConfig, ModelConfig, OptimConfig, RolloutConfig
from rlhf_npu.engines.models import load_policy, load_tokenizer, save_policy, stop_token_ids
from rlhf_npu.engines.process_group import join_process_group
from rlhf_npu.engines.rollout import RolloutEngine
from rlhf_npu.engines.trainer_engine import MicroLoss, TrainerEngine
from rlhf_npu.errors import ModelError, RlhfNpuError
from rlhf_npu.hybrid.resharding.gathered import whole_weights
from rlhf_npu.hybrid.resharding.reshard import Resharder
from rlhf_npu.hybrid.same_function import FunctionReport, compare_functions, trainer_scores
from rlhf_npu.platform import PLATFORMS, Platform
from rlhf_npu.preflight.model_trial import Outcome, Trial
from rlhf_npu.run_id import RUN_ID_VARIABLE
from rlhf_npu.workers.shared_memory import join_run

TEXT = (
    "A train leaves the station at noon and travels 60 miles an hour; a second one leaves an hour later and is faster "
    "by 20 miles an hour. When does the second train meet the first? Let t be the hours since noon. Then 60 t is "
    "80 (t - 1), so t is 4, and they meet at 4 o'clock, 240 miles away. "
)
LENGTHS = (9, 40, 81, 160)  # tokens of the prompts
RESPONSE = 24
BUCKET = 16 << 20
DISTURBANCE = 0.02  # of a weight's own size, and so much at least: enough to see whether it arrived


def main() -> None:
    """Run the trial that the command line describes."""
    join_run(os.environ[RUN_ID_VARIABLE], may_be_first=False)
    description, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    trial = Trial(**{**description, "model": ModelConfig(**description["model"])})
    try:
        _Rank(trial, PLATFORMS[trial.device], folder).run()
    except RlhfNpuError as error:
        _say(Outcome("refused", right=False, words=str(error)))
        sys.exit(1)


def _say(outcome: Outcome) -> None:
    if os.environ["RANK"] == "0":
        print(json.dumps(asdict(outcome)), flush=True)


class _Rank:
    """Both engines of one rank, and the parts of the trial in their order."""

    def __init__(self, trial: Trial, platform: Platform, folder: Path) -> None:
        self._trial, self._platform, self._folder = trial, platform, folder
        platform.activate()
        join_process_group(platform)
        self._tokenizer = load_tokenizer(trial.model)
        data = DataConfig(
            train_files=["none"],
            val_files=[],
            train_batch_size=1,
            max_prompt_length=max(LENGTHS),
            max_response_length=RESPONSE,
        )
        rollout = RolloutConfig(
            n=1,
            kv_cache_memory_gb=0.25,
            log_prob_micro_batch_size_per_device=1,
            tensor_model_parallel_size=trial.ranks,
            gpu_memory_utilization=trial.gpu_memory_utilization,
        )
        stops = stop_token_ids(trial.model, self._tokenizer)
        self._rollout = RolloutEngine(trial.model, rollout, data, platform, stops)
        self._rollout.sleep(level=1)
        self._trainer = self._build_trainer()
        self._rollout.wake_up(["weights", "kv_cache"])
        self._resharder = Resharder(self._policy, self._rollout, BUCKET)
        ids = self._tokenizer(TEXT * (max(LENGTHS) // 16))["input_ids"]
        self._prompts = [ids[:length] for length in LENGTHS]

    @property
    def _policy(self) -> Any:
        return self._trainer.module if isinstance(self._trainer, TrainerEngine) else self._trainer

    def run(self) -> None:
        """Compare, change the weights and reshard, at each level of sleep; save."""
        self._compare("loaded")
        self._resharder.rehearse()
        for level in (1, 2):
            before = trainer_scores(self._policy, self._prompts)
            self._change_weights()
            if trainer_scores(self._policy, self._prompts) == before:
                raise ModelError(f"model {self._trial.model.path!r}: new weights change no score")
            self._rollout.sleep(level)
            self._rollout.wake_up(["weights"])
            self._resharder.reshard()
            self._rollout.wake_up(["kv_cache"])
            self._compare(f"level {level}")
        if self._trial.save:
            self._save()
        self._rollout.shutdown()

    def _build_trainer(self) -> Any:
        stage, device = self._trial.zero_stage, self._platform.device()
        policy = load_policy(self._trial.model, zero_stage=stage or 0, device=device)
        if stage is None:
            return policy
        return TrainerEngine(
            policy,
            OptimConfig(lr=1e-3),
            zero_stage=stage,
            dtype=self._trial.model.dtype,
            grad_clip=1.0,
            optimizer_steps=2,
            platform=self._platform,
        )

    def _compare(self, part: str) -> None:
        report: FunctionReport = compare_functions(self._policy, self._rollout, self._prompts, 1.0, RESPONSE)
        worst = report.worst
        attention = f"attention: {report.trainer_attention} and {report.rollout_attention}"
        _say(Outcome(part, report.same, f"{worst}; {attention}", worst.mean, worst.mean_explained))
        if not report.same:
            sys.exit(1)

    def _change_weights(self) -> None:
        if isinstance(self._trainer, TrainerEngine):
            self._train()
            return
        generator = torch.Generator(self._platform.device()).manual_seed(self._resharder.version)
        for parameter in self._policy.parameters():
            noise = torch.empty_like(parameter).normal_(generator=generator)
            parameter.data += DISTURBANCE * noise * parameter.data.float().std(unbiased=False).to(noise)

    def _train(self) -> None:
        from tensordict import TensorDict

        ids = torch.tensor([self._prompts[1], self._prompts[2][: LENGTHS[1]]], device=self._platform.device())
        self._trainer.train_mini_batch(TensorDict({"ids": ids}, batch_size=[2]).split(1), _likelihood)

    def _save(self) -> None:
        weights = whole_weights(self._policy, BUCKET, keep=os.environ["RANK"] == "0")
        scores = trainer_scores(self._policy, self._prompts)
        if os.environ["RANK"] == "0":
            folder = self._folder / "saved"
            save_policy(self._policy, self._tokenizer, weights, folder)
            again = load_policy(replace(self._trial.model, path=str(folder))).to(self._platform.device())
            same = trainer_scores(again, self._prompts) == scores
            _say(
                Outcome("saved", same, "the saved model scores alike" if same else "the saved model scores differently")
            )
        torch.distributed.barrier()


def _likelihood(module: torch.nn.Module, batch: Any) -> MicroLoss:
    from rlhf_npu.algorithms.token_probs import log_probs_from_logits

    ids = batch["ids"]
    loss = -log_probs_from_logits(module(input_ids=ids, use_cache=False).logits[:, :-1], ids[:, 1:]).mean()
    return MicroLoss(loss, {"loss": loss})


if __name__ == "__main__":
    main()
