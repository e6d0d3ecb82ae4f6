#!/usr/bin/env bash
# GRPO in bf16 on SmolLM2-135M-Instruct with reasoning-gym's chain_sum. One 80 GB GPU.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
model=$("$PYTHON" "$root/scripts/convert_smollm2.py")
exec "$PYTHON" -m rlhf_npu.main_ppo recipe=grpo_smollm2_chain_sum actor_rollout_ref.model.path="$model" "$@"
