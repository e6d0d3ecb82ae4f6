"""Keys that users of verl, TRL and OpenRLHF type, and what they are called here."""

from __future__ import annotations

ACTOR = "actor_rollout_ref.actor"
ROLLOUT = "actor_rollout_ref.rollout"
REF = "actor_rollout_ref.ref"
_CLIP = f"{ACTOR}.clip_ratio_low and {ACTOR}.clip_ratio_high"
_ACTOR_ZERO = f"{ACTOR}.zero_stage"
_EPOCHS = f"{ACTOR}.ppo_epochs and critic.ppo_epochs"

FROM_VERL = {
    "trainer.n_gpus_per_node": "trainer.n_devices_per_node",
    f"{ACTOR}.clip_ratio": _CLIP,
    f"{ACTOR}.ppo_micro_batch_size": f"{ACTOR}.ppo_micro_batch_size_per_device",
    f"{ACTOR}.ppo_micro_batch_size_per_gpu": f"{ACTOR}.ppo_micro_batch_size_per_device",
    f"{ACTOR}.strategy": _ACTOR_ZERO,
    f"{ACTOR}.fsdp_config": _ACTOR_ZERO,
    f"{ACTOR}.shuffle": "data.shuffle",
    f"{ROLLOUT}.log_prob_micro_batch_size": f"{ROLLOUT}.log_prob_micro_batch_size_per_device",
    f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu": f"{ROLLOUT}.log_prob_micro_batch_size_per_device",
    f"{ROLLOUT}.dtype": "actor_rollout_ref.model.dtype",
    f"{ROLLOUT}.free_cache_engine": f"{ROLLOUT}.sleep_level",
    f"{ROLLOUT}.prompt_length": "data.max_prompt_length",
    f"{ROLLOUT}.response_length": "data.max_response_length",
    f"{REF}.log_prob_micro_batch_size": f"{REF}.log_prob_micro_batch_size_per_device",
    f"{REF}.log_prob_micro_batch_size_per_gpu": f"{REF}.log_prob_micro_batch_size_per_device",
    f"{REF}.fsdp_config": f"{REF}.zero_stage",
    "critic.ppo_micro_batch_size": "critic.ppo_micro_batch_size_per_device",
    "critic.ppo_micro_batch_size_per_gpu": "critic.ppo_micro_batch_size_per_device",
    "critic.ppo_mini_batch_size": f"{ACTOR}.ppo_mini_batch_size",
    "critic.strategy": "critic.zero_stage",
    "custom_reward_function.path": "reward.function=path/to/file.py:name",
    "custom_reward_function.name": "reward.function=path/to/file.py:name",
    "custom_reward_function.reward_kwargs": "reward.kwargs",
    "data.val_batch_size": "data.val_max_samples",
}

FROM_TRL = {
    "model_name_or_path": "actor_rollout_ref.model.path",
    "dataset_name": "data.train_files",
    "learning_rate": f"{ACTOR}.optim.lr",
    "num_generations": f"{ROLLOUT}.n",
    "per_device_train_batch_size": f"{ACTOR}.ppo_micro_batch_size_per_device",
    "gradient_accumulation_steps": f"{ACTOR}.ppo_mini_batch_size",
    "max_prompt_length": "data.max_prompt_length",
    "max_completion_length": "data.max_response_length",
    "num_train_epochs": "trainer.total_epochs",
    "num_iterations": _EPOCHS,
    "num_ppo_epochs": _EPOCHS,
    "max_steps": "trainer.total_training_steps",
    "beta": f"{ACTOR}.use_kl_loss and {ACTOR}.kl_loss_coef",
    "epsilon": _CLIP,
    "epsilon_high": f"{ACTOR}.clip_ratio_high",
    "loss_type": f"{ACTOR}.loss_agg_mode",
    "scale_rewards": "algorithm.norm_adv_by_std_in_grpo",
    "vllm_gpu_memory_utilization": f"{ROLLOUT}.gpu_memory_utilization",
    "vllm_tensor_parallel_size": f"{ROLLOUT}.tensor_model_parallel_size",
    "gradient_checkpointing": "actor_rollout_ref.model.enable_gradient_checkpointing",
    "bf16": "actor_rollout_ref.model.dtype=bfloat16",
    "output_dir": "trainer.default_local_dir",
    "report_to": "trainer.logger",
    "eval_steps": "trainer.test_freq",
    "save_steps": "trainer.save_freq",
    "max_grad_norm": f"{ACTOR}.grad_clip",
}

FROM_OPENRLHF = {
    "pretrain": "actor_rollout_ref.model.path",
    "prompt_data": "data.train_files",
    "rollout_batch_size": "data.train_batch_size",
    "train_batch_size": f"{ACTOR}.ppo_mini_batch_size, which counts prompts",
    "micro_train_batch_size": f"{ACTOR}.ppo_micro_batch_size_per_device",
    "micro_rollout_batch_size": f"{ROLLOUT}.log_prob_micro_batch_size_per_device",
    "n_samples_per_prompt": f"{ROLLOUT}.n",
    "actor_learning_rate": f"{ACTOR}.optim.lr",
    "critic_learning_rate": "critic.optim.lr",
    "init_kl_coef": "algorithm.kl_ctrl.kl_coef",
    "kl_target": "algorithm.kl_ctrl.target_kl",
    "kl_horizon": "algorithm.kl_ctrl.horizon",
    "eps_clip": _CLIP,
    "value_clip": "critic.cliprange_value",
    "advantage_estimator": "algorithm.adv_estimator",
    "lambd": "algorithm.lam",
    "prompt_max_len": "data.max_prompt_length",
    "generate_max_len": "data.max_response_length",
    "zero_stage": _ACTOR_ZERO,
    "save_path": "trainer.default_local_dir",
    "remote_rm_url": "reward.function",
}

NAMES_HERE = {**FROM_VERL, **FROM_TRL, **FROM_OPENRLHF}


def name_here(key: str) -> str | None:
    """What a key known from another library is called here; a key below a known one counts as that one."""
    parts = key.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((NAMES_HERE[prefix] for prefix in prefixes if prefix in NAMES_HERE), None)
