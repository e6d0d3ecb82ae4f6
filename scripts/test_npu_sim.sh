#!/usr/bin/env bash
# Tests on the NPU stack that users install, over a simulated AscendCL: all of it with streams that do their work at
# once, then what is about memory and the loop with streams that do it as late as they may. Takes pytest's arguments;
# then ACLSIM_STREAM=eager or lazy says which. Where there is no Python 3.12 it says so and tests nothing.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
status=0
"$root/scripts/setup_npu_sim.sh" || status=$?
if ((status == 3)); then
  exit 0
fi
((status == 0)) || exit "$status"

source "$root/.venv-npu/cann/set_env.sh"
# vLLM keeps what it knows of a model's class there, found out in ten seconds; that of another vLLM takes its place.
export VLLM_CACHE_ROOT=${VLLM_CACHE_ROOT:-$root/.venv-npu/vllm_cache}
export ACLSIM_DEVICES=${ACLSIM_DEVICES:-2} ACLSIM_DEVICE_MEMORY=${ACLSIM_DEVICE_MEMORY:-$((6 << 30))}
cd "$root"

run() {
  echo "test_npu_sim: ACLSIM_STREAM=$1"
  # A file's tests stay together, the longest files come first.
  ACLSIM_STREAM=$1 .venv-npu/bin/python -m pytest --timeout 600 --numprocesses 2 --dist loadfile \
    --no-loadscope-reorder "${@:2}"
}

if (($#)); then
  exec env ACLSIM_STREAM="${ACLSIM_STREAM:-eager}" .venv-npu/bin/python -m pytest "$@"
fi
loop=tests/trainer/test_main_ppo.py
recipe=test_grpo_digits_as_it_stands_but_for_its_length_on_two_npus
run eager \
  "$loop::test_rollout_and_trainer_agree_on_one_npu_with_graphs_that_sleeps_at_level_2" \
  "$loop::test_a_signal_ends_the_run_and_leaves_nothing_behind[ctrl_c]" \
  tests/sleep_mode/test_vllm_plugin.py tests/hybrid/test_reshard.py tests/sleep_mode/test_vllm_server.py \
  tests/hybrid/test_models.py "tests/trainer/test_recipes.py::$recipe" tests/sleep_mode/test_sleep_scenarios.py \
  tests/engines/test_rollout.py::test_log_probs_are_those_of_the_distribution_that_is_sampled \
  tests/roles/test_gradients.py tests/engines/test_trainer_states.py tests/npu tests/aclsim
# tests/npu chooses the streams by itself.
run lazy \
  "$loop::test_other_ways_to_run[grpo-tp2-zero3-level2]" tests/sleep_mode/test_sleep_scenarios.py tests/aclsim tests/allocator
