#!/usr/bin/env bash
# Sets up .venv if need be, then runs the tests: all of them, in two processes, or those that pytest's arguments name.
# Paths are relative to the project.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/scripts/setup.sh" smollm2
cd "$root"
if (($# == 0)); then
  # A file's tests stay together, the longest files come first.
  set -- --numprocesses 2 --dist loadfile --no-loadscope-reorder
fi
exec .venv/bin/python -m pytest "$@"
