#!/usr/bin/env bash
# Makes .venv-npu: the NPU stack that users install (requirements/npu-sim.lock), this project in it, and a simulated CANN
# in .venv-npu/cann. Does only what is missing. Ends with status 3 where there is no Python 3.12.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv-npu
lock=$root/requirements/npu-sim.lock
vllm=0.23.0

die() {
  echo "setup_npu_sim: $*" >&2
  exit 1
}

find_python() {
  local candidate shim
  shim=$(command -v python3.12 || true)
  for candidate in ${PYTHON_NPU:-python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12.*/bin/python3.12 \
    "${shim%/shims/*}"/versions/3.12.*/bin/python3.12}; do
    if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "setup_npu_sim: vllm-ascend's packages are for Python 3.12, and there is none here; set PYTHON_NPU to one" >&2
  exit 3
}

# done_before NAME FINGERPRINT: whether that part was finished with these very inputs.
done_before() {
  [[ -f $venv/.done/$1 && $(<"$venv/.done/$1") == "$2" ]]
}

mark_done() {
  mkdir -p "$venv/.done"
  echo "$2" >"$venv/.done/$1"
}

fingerprint() {
  cat "$@" | sha256sum | cut -d' ' -f1
}

install_stack() {
  local wanted
  wanted=$(fingerprint "$lock" "$root/tests/aclsim/cuda_stubs.py")
  [[ -x $venv/bin/python ]] && done_before stack "$wanted" && return
  echo "setup_npu_sim: making .venv-npu with $("$base" --version) ($base)"
  "$base" -m venv --clear "$venv"
  pip install --no-deps --no-compile -r "$lock" || die "could not install requirements/npu-sim.lock"
  "$venv/bin/python" "$root/tests/aclsim/cuda_stubs.py" "$packages/torch/lib"
  # As users install it on an NPU: without CUDA's kernels, and under the version that vllm-ascend asks for.
  VLLM_VERSION_OVERRIDE=$vllm VLLM_TARGET_DEVICE=empty pip install --no-deps --no-build-isolation --no-binary vllm \
    "vllm==$vllm" || die "could not build vLLM from its source"
  "$venv/bin/python" -W ignore -m compileall -qq -j 0 "$venv/lib" || true
  mark_done stack "$wanted"
}

pip() {
  # Neither torch nor vLLM may load torch_npu while CANN is not there yet.
  TORCH_DEVICE_BACKEND_AUTOLOAD=0 "$venv/bin/python" -m pip --disable-pip-version-check "$@"
}

install_project() {
  local wanted
  wanted=$(fingerprint "$root"/{pyproject.toml,setup.py} "$root"/allocator/csrc/*)
  done_before project "$wanted" && return
  echo "setup_npu_sim: building the native part and installing rlhf_npu"
  (cd "$root" && pip install --no-deps --no-build-isolation -e .)
  mark_done project "$wanted"
}

base=$(find_python)
if command -v flock >/dev/null; then
  exec 9>"$root/.venv-npu.lock"
  flock --nonblock 9 || { echo "setup_npu_sim: waiting for another set-up" && flock 9; }
fi
packages=$venv/lib/python3.12/site-packages
install_stack
install_project
make -s -j "$(nproc)" -C "$root/tests/aclsim" PYTHON="$venv/bin/python" CANN="$venv/cann"
# In each process of it, torch_npu's operators are computed by the simulation.
printf '%s\nimport simulated_npu.start\n' "$root/tests/aclsim/python" >"$packages/simulated_npu.pth"
