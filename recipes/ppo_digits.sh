#!/usr/bin/env bash
# PPO with a critic on the digit-sequence task: the default configuration. Two CPU cores, minutes.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "$PYTHON" -m rlhf_npu.main_ppo "$@"
