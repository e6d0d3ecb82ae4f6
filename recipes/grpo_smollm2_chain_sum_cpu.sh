#!/usr/bin/env bash
# The same as grpo_smollm2_chain_sum.sh, cut down to two steps on CPU cores.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
"$root/scripts/setup.sh" smollm2
PYTHON=$root/.venv/bin/python
model=$("$PYTHON" "$root/scripts/convert_smollm2.py")
exec "$PYTHON" -m rlhf_npu.main_ppo recipe=grpo_smollm2_chain_sum_cpu actor_rollout_ref.model.path="$model" "$@"
