#include "simulator.h"

#include <array>
#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <numeric>
#include <utility>

namespace aclsim {
namespace {

struct Fault {
  int calls_left;
  int code;
};

// Never destroyed: torch_npu calls in after static destruction began.
struct Machine {
  std::recursive_mutex lock;
  std::array<Device, kMaxDevices> devices;
  int device_count = 1;
  bool initialized = false;
  bool log = false;
  std::map<std::string, Fault> faults;
  std::map<std::string, std::uint64_t> calls;
  std::string device_error;  // of the last task that failed, for every thread
};

thread_local int chosen_device = -1;
thread_local std::string last_error;

std::uint64_t number_from(const char* variable, std::uint64_t otherwise) {
  const char* value = std::getenv(variable);
  return value == nullptr || *value == '\0' ? otherwise : std::strtoull(value, nullptr, 10);
}

int machine_devices() {
  const std::uint64_t devices = number_from("ACLSIM_DEVICES", 1);
  return devices < kMaxDevices ? static_cast<int>(devices) : kMaxDevices;
}

// The machine's devices that this process sees, by ASCEND_RT_VISIBLE_DEVICES. As CANN's documentation has it, numbers
// are separated by commas, and reading ends before anything else and before a device that is not there. Numbers that do
// not ascend void the list. The empty text lets a process see none, as vllm-ascend and Ray take it.
std::vector<int> visible_devices() {
  std::vector<int> all(machine_devices());
  std::iota(all.begin(), all.end(), 0);
  const char* at = std::getenv("ASCEND_RT_VISIBLE_DEVICES");
  if (at == nullptr) return all;
  std::vector<int> visible;
  while (std::isdigit(static_cast<unsigned char>(*at))) {
    char* end = nullptr;
    const unsigned long number = std::strtoul(at, &end, 10);
    if (number >= all.size()) break;
    if (!visible.empty() && static_cast<int>(number) <= visible.back()) return {};
    visible.push_back(static_cast<int>(number));
    if (*end != ',') break;
    at = end + 1;
  }
  return visible;
}

Machine* make_machine() {
  auto* const made = new Machine;
  const std::vector<int> visible = visible_devices();
  made->device_count = static_cast<int>(visible.size());
  made->log = number_from("ACLSIM_LOG", 0) > 0;
  for (int i = 0; i < kMaxDevices; ++i) {
    made->devices[i].index = i;
    made->devices[i].physical = i < made->device_count ? visible[i] : -1;
    made->devices[i].default_stream.device = i;
    made->devices[i].stats.capacity = number_from("ACLSIM_DEVICE_MEMORY", std::uint64_t{64} << 30);
  }
  return made;
}

Machine& machine() {
  static Machine* const made = make_machine();
  return *made;
}

}  // namespace

std::recursive_mutex& lock() { return machine().lock; }
int device_count() { return machine().device_count; }
Device& device(int index) { return machine().devices[index]; }
Device& current_device() { return device(chosen_device < 0 ? 0 : chosen_device); }
int current_index() { return chosen_device; }
void choose_device(int index) { chosen_device = index; }
bool initialized() { return machine().initialized; }
void set_initialized(bool value) { machine().initialized = value; }

int refuse(int code, const std::string& words) {
  last_error = "simulated AscendCL: " + words;
  ++current_device().stats.errors;
  if (machine().log) std::fprintf(stderr, "[aclsim] error %d: %s\n", code, words.c_str());
  return code;
}

std::string take_error() {
  const Guard guard(lock());
  return last_error.empty() ? machine().device_error : std::exchange(last_error, "");
}

void publish_error() {
  const Guard guard(lock());
  if (!last_error.empty()) machine().device_error = std::exchange(last_error, "");
}

int enter(const char* call) {
  ++machine().calls[call];
  const auto fault = machine().faults.find(call);
  if (fault == machine().faults.end() || --fault->second.calls_left > 0) return 0;
  const int code = fault->second.code;
  machine().faults.erase(fault);
  return refuse(code, std::string(call) + ": injected failure");
}

bool charge(int index, std::size_t bytes, std::uint64_t aclsim_stats::*kind) {
  aclsim_stats& stats = device(index).stats;
  if (stats.used + bytes > stats.capacity) return false;
  stats.used += bytes;
  stats.*kind += bytes;
  return true;
}

void refund(int index, std::size_t bytes, std::uint64_t aclsim_stats::*kind) {
  device(index).stats.used -= bytes;
  device(index).stats.*kind -= bytes;
}

}  // namespace aclsim

using namespace aclsim;

void aclsim_count_error() {
  const Guard guard(lock());
  ++current_device().stats.errors;
}

int aclsim_refuse(int code, const std::string& words) {
  const Guard guard(lock());
  return refuse(code, words);
}

int aclsim_device_fault(int code, const std::string& words) {
  const Guard guard(lock());
  if (code == ACL_ERROR_RT_DEVICE_MEM_ERROR) ++current_device().stats.faults;
  refuse(code, words);
  publish_error();
  return code;
}

int aclsim_physical_device() {
  const Guard guard(lock());
  return current_device().physical;
}

void aclsim_report_error(const std::string& words) {
  const Guard guard(lock());
  refuse(ACL_ERROR_FAILURE, words);
}

void aclsim_report_fault(const std::string& words) {
  const Guard guard(lock());
  ++current_device().stats.faults;
  refuse(ACL_ERROR_RT_DEVICE_MEM_ERROR, "device fault: " + words);
}

int aclsim_enqueue(void* stream, std::function<int()> task, const std::vector<aclsim_range>& writes) {
  const Guard guard(lock());
  std::vector<Range> ranges;
  for (const auto& [first, bytes] : writes) ranges.push_back({first, bytes});
  return enqueue(stream_of(stream), std::move(task), ranges);
}

void aclsim_get_stats(int index, aclsim_stats* stats) {
  const Guard guard(lock());
  *stats = device(index).stats;
  stats->host = device(0).stats.host;
  stats->pending = pending_tasks();
  count_mapped(stats);
}

void aclsim_set_capacity(int index, std::uint64_t bytes) {
  const Guard guard(lock());
  device(index).stats.capacity = bytes;
}

void aclsim_fail(const char* call, int nth, int code) {
  const Guard guard(lock());
  machine().faults.erase(call);
  if (nth > 0) machine().faults[call] = {nth, code};
}

std::uint64_t aclsim_calls(const char* call) {
  const Guard guard(lock());
  return machine().calls[call];
}

int aclsim_probe(const void* address, std::size_t bytes) {
  const Guard guard(lock());
  return probe(address, bytes);
}
