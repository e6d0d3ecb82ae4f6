#!/usr/bin/env bash
# PPO on the digit-sequence task whose only reward is a reward model that is trained on pairs just before, with KL in the
# reward; the task's own rule has weight 0 and is logged beside it. Two CPU cores, minutes.
#
# REWARD_MODEL=FOLDER takes a reward model that is there; otherwise REWARD_RUN is the folder of the run that trains it,
# and REWARD_STEPS its length.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
if [[ -z ${REWARD_MODEL:-} ]]; then
  REWARD_RUN=${REWARD_RUN:-outputs/reward_model_$(date +%Y-%m-%d_%H-%M-%S)}
  "$PYTHON" -m rlhf_npu.main_reward "trainer.default_local_dir=$REWARD_RUN" \
    'data.train_files=[builtin:digits/flaws]' 'data.val_files=[builtin:digits/flaws_val]' \
    optim.lr_warmup_steps=20 "trainer.total_training_steps=${REWARD_STEPS:-300}"
  REWARD_MODEL=$REWARD_RUN/model
fi
exec "$PYTHON" -m rlhf_npu.main_ppo reward_model.enable=true "reward_model.model.path=$REWARD_MODEL" \
  reward.function=null 'reward.functions=[digits]' 'reward.weights=[0]' \
  algorithm.use_kl_in_reward=true algorithm.kl_ctrl.kl_coef=0.5 trainer.experiment_name=digits_reward_model "$@"
