#!/usr/bin/env bash
# Makes .venv from requirements/cpu.lock and installs this project in it; does only what is missing.
# Usage: scripts/setup.sh [lock ...]     lock: another file of requirements/, for example smollm2
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv

die() {
  echo "setup: $*" >&2
  exit 1
}

supported() {
  "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null
}

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.11 python3.12 python3 python}; do
    if command -v "$candidate" >/dev/null && supported "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  die "needs Python 3.11 or 3.12 with the venv module; tried: ${PYTHON:-python3.11 python3.12 python3 python}." \
    "Set PYTHON to one, for example PYTHON=/opt/python3.11/bin/python3 scripts/setup.sh"
}

fingerprint() {
  cat "$@" | sha256sum | cut -d' ' -f1
}

# done_before NAME FINGERPRINT: whether that part of the set-up was finished with these very inputs.
done_before() {
  [[ -f $venv/.done/$1 && $(<"$venv/.done/$1") == "$2" ]]
}

mark_done() {
  mkdir -p "$venv/.done"
  echo "$2" >"$venv/.done/$1"
}

install_lock() {
  local name=$1 file=$root/requirements/$1.lock wanted
  wanted=$(fingerprint "$file")
  done_before "$name" "$wanted" && return
  echo "setup: installing requirements/$name.lock ($(grep -c == "$file") packages)"
  # Without dependencies: the lock is complete, and it leaves out packages that vLLM names but that
  # break torch's CPU build (see README.md).
  "$venv/bin/python" -m pip install --no-deps --no-compile --disable-pip-version-check -r "$file" ||
    die "could not install requirements/$name.lock; if pip does not find torch's CPU build (+cpu)," \
      "point pip at PyTorch's index of CPU wheels (PIP_EXTRA_INDEX_URL) and run this again"
  echo "setup: compiling Python files on all cores"
  # Packages carry files for other Python versions too, which do not compile here.
  "$venv/bin/python" -W ignore -m compileall -qq -j 0 "$venv/lib" || true
  mark_done "$name" "$wanted"
}

install_project() {
  local wanted
  wanted=$(fingerprint "$root"/{pyproject.toml,setup.py} "$root"/allocator/csrc/*)
  done_before project "$wanted" && return
  command -v "${CXX:-c++}" >/dev/null || die "needs a C++17 compiler, for example g++; set CXX to it"
  echo "setup: building the native part and installing rlhf_npu"
  (cd "$root" && "$venv/bin/python" -m pip install --no-deps --no-build-isolation \
    --disable-pip-version-check -e .)
  mark_done project "$wanted"
}

make_venv() {
  local base=$1 wanted
  wanted=$(fingerprint "$root/requirements/cpu.lock")
  [[ -x $venv/bin/python ]] && done_before cpu "$wanted" && return
  echo "setup: making .venv with $("$base" --version) ($base)"
  "$base" -m venv --clear "$venv"
}

for lock in "$@"; do
  [[ -f $root/requirements/$lock.lock ]] || die "there is no requirements/$lock.lock"
done

# Two scripts started together must not install into the same folder at once.
if command -v flock >/dev/null; then
  exec 9>"$root/.venv.lock"
  flock --nonblock 9 || { echo "setup: waiting for another set-up" && flock 9; }
fi

base=$(find_python)
make_venv "$base"
for lock in cpu "$@"; do
  install_lock "$lock"
done
install_project
