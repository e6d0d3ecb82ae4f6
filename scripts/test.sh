#!/usr/bin/env bash
# Sets up .venv if need be, then runs the tests. Takes pytest's arguments; paths are relative to the project.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/scripts/setup.sh" smollm2
cd "$root"
exec .venv/bin/python -m pytest "$@"
