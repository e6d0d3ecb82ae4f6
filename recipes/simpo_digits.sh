#!/usr/bin/env bash
# SimPO on the digit-sequence task. Two CPU cores, minutes. On devices: n_devices_per_node, a model of yours, bfloat16,
# data.max_tokens_per_device of some thousands, and a learning rate of 1e-6 or less.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "$PYTHON" -m rlhf_npu.main_dpo loss.loss_type=simpo loss.beta=2.0 "$@"
