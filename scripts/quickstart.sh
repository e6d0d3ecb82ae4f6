#!/usr/bin/env bash
# Sets up .venv if need be, then trains: PPO on the digit-sequence task. Takes overrides, as main_ppo does.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/scripts/setup.sh"
exec "$root/.venv/bin/python" -m rlhf_npu.main_ppo "$@"
