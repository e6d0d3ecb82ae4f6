// The state of the simulated machine. One recursive lock guards all of it: contention does not matter here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "acl/acl.h"
#include "control.h"

namespace aclsim {

constexpr std::size_t kGranularity = std::size_t{2} << 20;
constexpr int kMaxDevices = 16;

struct Graph;
struct TaskUpdate;

struct Range {
  void* first;
  std::size_t bytes;
};

struct Stream {
  Stream();
  ~Stream();
  int device = 0;
  int id = 0;
  std::deque<std::function<int()>> tasks;
  std::uint64_t finished = 0;  // tasks
  bool running = false;
  int error = 0;  // of a task that ran; reported by the next call that waits
  std::shared_ptr<Graph> capture;      // records its work
  std::unique_ptr<TaskUpdate> update;  // takes its work to replace that of a task group
};

struct Event {
  std::uint64_t recorded = 0;
  std::uint64_t done = 0;
  std::uint64_t nanoseconds = 0;
  Stream* stream = nullptr;
  bool external = false;  // for those outside of a graph, at its replay
  std::weak_ptr<Graph> capture;  // that it was last recorded in
  bool captured = false;
  std::size_t captured_tasks = 0;  // before it
};

struct Device {
  int index = 0;  // its address is the device's context
  int physical = 0;  // which of the machine's devices it is
  aclsim_stats stats{};
  Stream default_stream;
};

std::recursive_mutex& lock();
using Guard = std::lock_guard<std::recursive_mutex>;

int device_count();
Device& device(int index);
Device& current_device();
int current_index();  // -1: the thread has chosen none
void choose_device(int index);
bool initialized();
void set_initialized(bool value);

// Refuses a call: remembers the words for aclGetRecentErrMsg, and counts.
int refuse(int code, const std::string& words);
std::string take_error();
void publish_error();  // this thread's words are of a task, which any thread may ask for
// Counts the call and returns the code it is to fail with, 0 when it is to go well.
int enter(const char* call);
bool charge(int device, std::size_t bytes, std::uint64_t aclsim_stats::*kind);
void refund(int device, std::size_t bytes, std::uint64_t aclsim_stats::*kind);

// Memory: 1 backed, 0 an address without memory, -1 not a device address.
int probe(const void* address, std::size_t bytes);
bool is_pinned_host(const void* address);
int copy_bytes(void* to, std::size_t capacity, const void* from, std::size_t bytes);
int set_bytes(void* to, std::size_t capacity, int value, std::size_t bytes);
void count_mapped(aclsim_stats* stats);

// Streams: eager ones run a task at once; lazy ones (ACLSIM_STREAM=lazy) only when somebody waits, which is the
// latest moment that AscendCL allows.
Stream* stream_of(void* stream);
int enqueue(Stream* stream, std::function<int()> task, const std::vector<Range>& writes = {});
int drain_all();
void settle_all();  // waits too, and leaves what failed to the next call that tells
std::size_t pending_tasks();

}  // namespace aclsim

// First line of each simulated function: takes the lock, and returns an injected failure.
#define ACLSIM_ENTER()                   \
  const aclsim::Guard guard(aclsim::lock()); \
  if (const int injected = aclsim::enter(__func__)) return injected
