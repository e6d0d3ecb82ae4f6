"""Keys of TRL's, verl's and OpenRLHF's trainers of SFT, preferences and reward models: what they are called here."""

from __future__ import annotations

_BATCH = "data.train_batch_size, which counts examples over all devices"
_TOKENS = "data.max_tokens_per_device, which counts tokens"
_STEPS = "optim.lr_warmup_steps, which counts optimizer steps"

FROM_TRL = {
    "model_name_or_path": "model.path",
    "learning_rate": "optim.lr",
    "lr_scheduler_type": "optim.lr_scheduler_type",
    "warmup_steps": "optim.lr_warmup_steps",
    "warmup_ratio": _STEPS,
    "weight_decay": "optim.weight_decay",
    "adam_beta1": "optim.betas",
    "adam_beta2": "optim.betas",
    "adam_epsilon": "optim.eps",
    "max_grad_norm": "engine.grad_clip",
    "beta": "loss.beta",
    "loss_type": "loss.loss_type",
    "label_smoothing": "loss.label_smoothing",
    "f_divergence_type": "loss.f_divergence_type",
    "f_alpha_divergence_coef": "loss.f_alpha_divergence_coef",
    "rpo_alpha": "loss.rpo_alpha",
    "simpo_gamma": "loss.simpo_gamma",
    "desirable_weight": "loss.desirable_weight",
    "undesirable_weight": "loss.undesirable_weight",
    "center_rewards_coefficient": "loss.center_rewards_coefficient",
    "max_length": "data.max_length",
    "truncation_mode": "data.truncation",
    "dataset_name": "data.train_files",
    "per_device_train_batch_size": _TOKENS,
    "per_device_eval_batch_size": _TOKENS,
    "gradient_accumulation_steps": _BATCH,
    "gradient_checkpointing": "model.enable_gradient_checkpointing",
    "attn_implementation": "model.attn_implementation",
    "num_train_epochs": "trainer.total_epochs",
    "max_steps": "trainer.total_training_steps",
    "output_dir": "trainer.default_local_dir",
    "eval_steps": "trainer.test_freq",
    "save_steps": "trainer.save_freq",
    "report_to": "trainer.logger",
    "run_name": "trainer.experiment_name",
    "bf16": "model.dtype",
}
FROM_VERL = {
    "trainer.n_gpus_per_node": "trainer.n_devices_per_node",
    "model.partial_pretrain": "model.path",
    "data.micro_batch_size": _TOKENS,
    "data.micro_batch_size_per_gpu": _TOKENS,
    "data.max_token_len_per_gpu": "data.max_tokens_per_device",
    "optim.clip_grad": "engine.grad_clip",
    "optim.lr_warmup_steps_ratio": _STEPS,
    "optim.warmup_steps_ratio": _STEPS,
    "optim.lr_scheduler": "optim.lr_scheduler_type",
}
FROM_OPENRLHF = {
    "pretrain": "model.path",
    "train_batch_size": "data.train_batch_size",
    "micro_train_batch_size": _TOKENS,
    "max_len": "data.max_length",
    "zero_stage": "engine.zero_stage",
    "max_epochs": "trainer.total_epochs",
    "save_path": "trainer.default_local_dir",
    "dataset": "data.train_files",
    "eval_dataset": "data.val_files",
}
OFFLINE_NAMES_HERE = {**FROM_TRL, **FROM_VERL, **FROM_OPENRLHF}

_WHOLE = "every weight is trained"
OFFLINE_NOT_HERE: dict[str, tuple[str, str]] = {
    "packing": (
        "TRL and OpenRLHF",
        "examples are always packed, each as if it stood alone",
    ),
    "packing_samples": ("OpenRLHF", "examples are always packed, each as if it stood alone"),
    "padding_free": ("TRL", "nothing is padded"),
    "use_remove_padding": ("verl", "nothing is padded"),
    "completion_only_loss": ("TRL", "prompts are never trained on; a text under 'text' is trained on as a whole"),
    "assistant_only_loss": ("TRL", "chats are trained on their assistant's turns alone; data.train_on says which"),
    "precompute_ref_log_probs": ("TRL", "the reference's log-probabilities are computed once, and kept on the disk"),
    "ref_model": ("TRL", "the reference is the model as it is before training"),
    "lora": ("verl, TRL and OpenRLHF", _WHOLE),
    "lora_rank": ("verl and OpenRLHF", _WHOLE),
    "use_peft": ("TRL", _WHOLE),
}
