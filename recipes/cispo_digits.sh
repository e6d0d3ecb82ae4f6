#!/usr/bin/env bash
# CISPO on the digit-sequence task. Two CPU cores, minutes.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "$PYTHON" -m rlhf_npu.main_ppo algorithm=cispo "$@"
