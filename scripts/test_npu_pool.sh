#!/usr/bin/env bash
# Tests the sleep pool with torch_npu 2.13 on a simulated AscendCL, whose streams run late: that torch_npu gives a
# MemPool's segments back, which 2.10, the one that users have, does not (scripts/test_npu_sim.sh).
# Takes pytest's arguments.
# .venv-npu-pool holds torch_npu alone and sees .venv's packages: importing torch loads torch_npu there, and only there.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
lock=$root/requirements/torch-npu-pool.lock
venv=$root/.venv-npu-pool
"$root/scripts/setup.sh" smollm2

if ! cmp --silent "$lock" "$venv/.done"; then
  echo "test_npu_pool: making .venv-npu-pool"
  "$root/.venv/bin/python" -m venv --clear --without-pip "$venv"
  packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  "$root/.venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$packages/torch_of_venv.pth"
  "$root/.venv/bin/python" -m pip --python "$venv/bin/python" install --no-deps --disable-pip-version-check -r "$lock"
  cp "$lock" "$venv/.done"
fi
make -s -j "$(nproc)" -C "$root/tests/aclsim" pool PYTHON="$venv/bin/python" CANN="$venv/cann"
source "$venv/cann/set_env.sh"

cd "$root"
(($#)) || set -- --numprocesses 2 --dist loadfile tests/allocator
ACLSIM_STREAM=${ACLSIM_STREAM:-lazy} exec "$venv/bin/python" -m pytest "$@"
