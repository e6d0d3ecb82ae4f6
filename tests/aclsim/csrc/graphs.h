// What streams and graphs know of each other.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "simulator.h"

namespace aclsim {

using GraphPointer = std::shared_ptr<Graph>;

struct Recorded {
  std::function<int()> task;
  AclsimMake make;  // or what makes it for one replay
};

struct TaskGroup {
  Stream* stream = nullptr;
  std::weak_ptr<Graph> graph;
  std::vector<std::size_t> members;  // which of the graph's tasks
};

struct TaskUpdate {
  TaskGroup* group;
  GraphPointer graph;
  std::vector<std::function<int()>> tasks;
};

struct Saved {
  void* first;
  std::vector<char> bytes;
};

struct CapturingStream {
  Stream* stream;
  std::size_t last_task;  // of the graph's tasks, one past the stream's last
  bool joined;  // another stream waits for all that was recorded on this one
};

struct Graph {
  Stream* origin = nullptr;
  aclmdlRICaptureMode mode = ACL_MODEL_RI_CAPTURE_MODE_GLOBAL;
  GraphPointer* handle = nullptr;
  bool capturing = true;
  bool valid = true;
  std::vector<CapturingStream> streams;
  std::vector<Recorded> tasks;
  std::vector<Saved> saved;
  std::unique_ptr<TaskGroup> group;  // being recorded
  std::vector<std::unique_ptr<TaskGroup>> groups;
};

// Of a capturing stream. A task that names what it writes is run as well, so that later kernels find what they read.
int record_task(Stream* stream, std::function<int()> task, const std::vector<Range>& writes);
int record_event(Stream* stream, Event* event);
// Of a capturing stream, or for an event that was recorded on one: the stream joins the capture.
int record_wait(Stream* stream, const Event& event);
// 0, or the code with which a call that waits is refused: for a stream, and for all work of the device.
int refuse_wait(const Stream& stream, const char* call);
int refuse_wait_for_all(const char* call);
void advance_all(Stream* stream);

}  // namespace aclsim
