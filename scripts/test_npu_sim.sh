#!/usr/bin/env bash
# Tests the sleep pool with the real torch_npu on a simulated AscendCL, whose streams run early and late.
# Takes pytest's arguments.
# .venv-npu holds torch_npu alone and sees .venv's packages: importing torch loads torch_npu there, and only there.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
lock=$root/requirements/npu-sim.lock
venv=$root/.venv-npu
"$root/scripts/setup.sh" smollm2

if ! cmp --silent "$lock" "$venv/.done"; then
  echo "test_npu_sim: making .venv-npu"
  "$root/.venv/bin/python" -m venv --clear --without-pip "$venv"
  packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  "$root/.venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$packages/torch_of_venv.pth"
  "$root/.venv/bin/python" -m pip --python "$venv/bin/python" install --no-deps --disable-pip-version-check -r "$lock"
  cp "$lock" "$venv/.done"
fi
make -s -j "$(nproc)" -C "$root/tests/aclsim" PYTHON="$venv/bin/python"

cd "$root"
if (($#)); then
  ACLSIM_STREAM=eager "$venv/bin/python" -m pytest "$@"
  ACLSIM_STREAM=lazy "$venv/bin/python" -m pytest "$@"
else
  # Streams that do their work at once are what tests/allocator meets on the CPU. Each run keeps one core busy.
  log=$(mktemp)
  ACLSIM_STREAM=eager "$venv/bin/python" -m pytest tests/aclsim &>"$log" &
  eager=$!
  trap 'kill "$eager" 2>/dev/null || true; rm -f "$log"' EXIT
  status=0
  ACLSIM_STREAM=lazy "$venv/bin/python" -m pytest tests/allocator tests/aclsim || status=$?
  wait "$eager" || status=$?
  cat "$log"
  exit "$status"
fi
