// Captured graphs. What is enqueued on a capturing stream is recorded, and a replay runs the record in order: an order
// in which a program enqueued work respects all its events.
//
// A capture leaves memory as it was, as on hardware. Yet kernels run once during it where the host must know the shape
// of what they make; so memory is saved before such a write, and restored when the capture ends.
#include "graphs.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <fstream>

namespace aclsim {
namespace {

constexpr int kNotSupported = ACL_ERROR_RT_FEATURE_NOT_SUPPORT;

// Never destroyed, like the rest of the machine.
std::vector<GraphPointer>& captures() {
  static auto* const made = new std::vector<GraphPointer>;
  return *made;
}

aclmdlRICaptureMode& thread_mode() {
  static thread_local aclmdlRICaptureMode mode = ACL_MODEL_RI_CAPTURE_MODE_GLOBAL;
  return mode;
}

int invalidate(Graph* graph, int code, const std::string& words) {
  graph->valid = false;
  return refuse(code, words);
}

bool is_saved(const Graph& graph, const Range& range) {
  const auto holds = [&range](const Saved& one) { return one.first == range.first && one.bytes.size() >= range.bytes; };
  return std::any_of(graph.saved.begin(), graph.saved.end(), holds);
}

bool is_memory(const void* first, std::size_t bytes) { return probe(first, bytes) == 1 || is_pinned_host(first); }

void save(Graph* graph, const Range& range) {
  if (range.bytes == 0 || !is_memory(range.first, range.bytes) || is_saved(*graph, range)) return;
  const char* const bytes = static_cast<const char*>(range.first);
  graph->saved.push_back({range.first, {bytes, bytes + range.bytes}});
}

void restore(Graph* graph) {
  for (auto one = graph->saved.rbegin(); one != graph->saved.rend(); ++one) {
    if (is_memory(one->first, one->bytes.size())) std::memcpy(one->first, one->bytes.data(), one->bytes.size());
  }
  graph->saved.clear();
}

void join(const GraphPointer& graph, Stream* stream) {
  if (stream->capture == graph) return;
  advance_all(stream);  // what was enqueued before: the kernels that run during the capture may read it
  stream->capture = graph;
  graph->streams.push_back({stream, 0, true});
}

CapturingStream* find(Graph* graph, const Stream* stream) {
  const auto same = [stream](const CapturingStream& one) { return one.stream == stream; };
  const auto found = std::find_if(graph->streams.begin(), graph->streams.end(), same);
  return found == graph->streams.end() ? nullptr : &*found;
}

bool all_joined(const Graph& graph) {
  const auto joined = [&graph](const CapturingStream& one) { return one.stream == graph.origin || one.joined; };
  return std::all_of(graph.streams.begin(), graph.streams.end(), joined);
}

struct Replay {
  GraphPointer graph;
  Stream* stream;
  std::vector<std::function<int()>> made;  // in the order of the graph's tasks, empty for those that it holds itself
  std::size_t next = 0;
};

std::shared_ptr<Replay> make_replay(const GraphPointer& graph, Stream* stream) {
  const auto replay = std::make_shared<Replay>(Replay{graph, stream, {}});
  for (const Recorded& one : graph->tasks) replay->made.push_back(one.make ? one.make(stream) : nullptr);
  return replay;
}

// Goes on where it stopped: a task may have to wait for another device.
int run(Replay* replay) {
  for (; replay->next < replay->made.size(); ++replay->next) {
    const auto& made = replay->made[replay->next];
    const int error = made ? made() : replay->graph->tasks[replay->next].task();
    if (error == kAclsimAgain) return error;
    if (error == 0) continue;
    // The error is of the work, and the call that started it has gone well: who waits is told.
    if (replay->stream->error != 0) continue;
    replay->stream->error = error;
    publish_error();
  }
  return 0;
}

void append(Stream* stream, Recorded recorded) {
  Graph& graph = *stream->capture;
  if (graph.group && graph.group->stream == stream) graph.group->members.push_back(graph.tasks.size());
  graph.tasks.push_back(std::move(recorded));
  CapturingStream* const one = find(&graph, stream);
  one->last_task = graph.tasks.size();
  one->joined = false;
}

GraphPointer& graph_of(aclmdlRI model) { return *static_cast<GraphPointer*>(model); }

int not_capturing(const char* call) {
  return refuse(ACL_ERROR_RT_STREAM_NOT_CAPTURED, std::string(call) + ": the stream is not being captured");
}

}  // namespace

int record_task(Stream* stream, std::function<int()> task, const std::vector<Range>& writes) {
  Graph& graph = *stream->capture;
  for (const Range& range : writes) save(&graph, range);
  const int error = writes.empty() ? 0 : task();
  if (error != 0) {
    graph.valid = false;
    return error;
  }
  append(stream, {std::move(task), nullptr});
  return 0;
}

int record_event(Stream* stream, Event* event) {
  if (event->external) return invalidate(stream->capture.get(), kNotSupported, "external events are not simulated");
  event->capture = stream->capture;
  event->captured_tasks = stream->capture->tasks.size();
  return 0;
}

int record_wait(Stream* stream, const Event& event) {
  if (!event.captured) {
    return invalidate(stream->capture.get(), ACL_ERROR_RT_CAPTURE_DEPENDENCY,
                      "a captured stream waits for an event that was recorded outside of the capture");
  }
  const GraphPointer graph = event.capture.lock();
  if (graph == nullptr || !graph->capturing) {
    return refuse(ACL_ERROR_RT_EVENT_CAPTURED, "a wait for an event that was recorded during a capture that has ended");
  }
  if (stream->capture != nullptr && stream->capture != graph) {
    return invalidate(stream->capture.get(), ACL_ERROR_STREAM_CAPTURE_CONFLICT, "two captures depend on each other");
  }
  join(graph, stream);
  CapturingStream* const source = find(graph.get(), event.stream);
  if (source != nullptr && source->last_task <= event.captured_tasks) source->joined = true;
  return 0;
}

int refuse_wait(const Stream& stream, const char* call) {
  if (stream.capture == nullptr) return 0;
  return invalidate(stream.capture.get(), ACL_ERROR_RT_STREAM_CAPTURED,
                    std::string(call) + ": the stream is being captured, so that nothing of it can be waited for");
}

int refuse_wait_for_all(const char* call) {
  if (thread_mode() == ACL_MODEL_RI_CAPTURE_MODE_RELAXED) return 0;
  for (const GraphPointer& graph : captures()) {
    if (graph->mode == ACL_MODEL_RI_CAPTURE_MODE_RELAXED) continue;
    return invalidate(graph.get(), ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT,
                      std::string(call) + ": a stream is being captured");
  }
  return 0;
}

}  // namespace aclsim

using namespace aclsim;

int aclsim_capture(void* stream) {
  const Guard guard(lock());
  const Stream& one = *stream_of(stream);
  if (one.update != nullptr) return kAclsimUpdating;
  return one.capture != nullptr ? kAclsimCapturing : 0;
}

int aclsim_record(void* stream, AclsimMake make) {
  const Guard guard(lock());
  Stream* const on = stream_of(stream);
  if (on->capture == nullptr) return refuse(kNotSupported, "a task that cannot run twice is part of a task update");
  append(on, {nullptr, std::move(make)});
  return 0;
}

void aclsim_save(void* stream, void* first, std::size_t bytes) {
  const Guard guard(lock());
  save(stream_of(stream)->capture.get(), {first, bytes});
}

extern "C" {

// Whether a graph keeps words on its operators, which its debug print is for.
aclError aclrtSetStreamAttribute(aclrtStream, aclrtStreamAttr attribute, aclrtStreamAttrValue*) {
  ACLSIM_ENTER();
  if (attribute == ACL_STREAM_ATTR_CACHE_OP_INFO) return 0;
  return refuse(kNotSupported, "stream attribute " + std::to_string(attribute) + " is not simulated");
}

aclError aclmdlRICaptureBegin(aclrtStream stream, aclmdlRICaptureMode mode) {
  ACLSIM_ENTER();
  Stream* const origin = stream_of(stream);
  if (origin == &current_device().default_stream) {
    return refuse(ACL_ERROR_RT_STREAM_CAPTURE_IMPLICIT, "the default stream cannot be captured");
  }
  if (origin->capture != nullptr) return refuse(ACL_ERROR_RT_STREAM_CAPTURED, "the stream is being captured already");
  const auto graph = std::make_shared<Graph>();
  graph->origin = origin;
  graph->mode = mode;
  graph->handle = new GraphPointer(graph);
  join(graph, origin);
  captures().push_back(graph);
  return 0;
}

aclError aclmdlRICaptureGetInfo(aclrtStream stream, aclmdlRICaptureStatus* status, aclmdlRI* model) {
  ACLSIM_ENTER();
  const GraphPointer& graph = stream_of(stream)->capture;
  *status = ACL_MODEL_RI_CAPTURE_STATUS_NONE;
  if (graph == nullptr) return 0;
  *status = graph->valid ? ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE : ACL_MODEL_RI_CAPTURE_STATUS_INVALIDATED;
  *model = graph->handle;
  return 0;
}

aclError aclmdlRICaptureEnd(aclrtStream stream, aclmdlRI* model) {
  ACLSIM_ENTER();
  const GraphPointer graph = stream_of(stream)->capture;
  if (graph == nullptr) return not_capturing(__func__);
  if (graph->origin != stream_of(stream)) {
    return refuse(ACL_ERROR_RT_STREAM_CAPTURE_UNMATCHED, "the capture was begun on another stream");
  }
  for (const CapturingStream& one : graph->streams) one.stream->capture.reset();
  captures().erase(std::find(captures().begin(), captures().end(), graph));
  restore(graph.get());
  graph->capturing = false;
  *model = graph->handle;
  if (graph->valid && !all_joined(*graph)) {
    graph->valid = false;
    return refuse(ACL_ERROR_RT_STREAM_UNJOINED, "a stream joined the capture, and its work was never waited for");
  }
  return graph->valid ? 0 : refuse(ACL_ERROR_RT_STREAM_CAPTURE_INVALIDATED, "the capture was invalidated before");
}

aclError aclmdlRICaptureThreadExchangeMode(aclmdlRICaptureMode* mode) {
  std::swap(*mode, thread_mode());
  return 0;
}

aclError aclmdlRIExecuteAsync(aclmdlRI model, aclrtStream stream) {
  ACLSIM_ENTER();
  const GraphPointer graph = graph_of(model);
  Stream* const on = stream_of(stream);
  if (graph->capturing || !graph->valid) {
    return refuse(ACL_ERROR_RT_MODEL_CAPTURED, "the graph was not captured to its end");
  }
  if (on->capture != nullptr) {
    return invalidate(on->capture.get(), kNotSupported, "a graph in a graph is not simulated");
  }
  return enqueue(on, [replay = make_replay(graph, on)] { return run(replay.get()); });
}

aclError aclmdlRIDestroy(aclmdlRI model) {
  ACLSIM_ENTER();
  delete &graph_of(model);
  return 0;
}

aclError aclmdlRICaptureTaskGrpBegin(aclrtStream stream) {
  ACLSIM_ENTER();
  Graph* const graph = stream_of(stream)->capture.get();
  if (graph == nullptr) return not_capturing(__func__);
  if (graph->group != nullptr) return invalidate(graph, kNotSupported, "a task group was begun in a task group");
  graph->group = std::make_unique<TaskGroup>();
  graph->group->stream = stream_of(stream);
  graph->group->graph = stream_of(stream)->capture;
  return 0;
}

aclError aclmdlRICaptureTaskGrpEnd(aclrtStream stream, aclrtTaskGrp* handle) {
  ACLSIM_ENTER();
  Graph* const graph = stream_of(stream)->capture.get();
  if (graph == nullptr) return not_capturing(__func__);
  if (graph->group == nullptr || graph->group->stream != stream_of(stream)) {
    return invalidate(graph, ACL_ERROR_RT_PARAM_INVALID, "a task group was ended that was not begun");
  }
  *handle = graph->group.get();
  graph->groups.push_back(std::move(graph->group));
  return 0;
}

aclError aclmdlRICaptureTaskUpdateBegin(aclrtStream stream, aclrtTaskGrp handle) {
  ACLSIM_ENTER();
  auto* const group = static_cast<TaskGroup*>(handle);
  stream_of(stream)->update = std::make_unique<TaskUpdate>(TaskUpdate{group, group->graph.lock(), {}});
  return 0;
}

aclError aclmdlRICaptureTaskUpdateEnd(aclrtStream stream) {
  ACLSIM_ENTER();
  const auto update = std::shared_ptr<TaskUpdate>(std::move(stream_of(stream)->update));
  if (update == nullptr) return refuse(ACL_ERROR_RT_PARAM_INVALID, "a task update was ended that was not begun");
  const auto& members = update->group->members;
  if (update->tasks.size() != members.size()) {
    return refuse(ACL_ERROR_RT_PARAM_INVALID, "a task update has " + std::to_string(update->tasks.size()) +
                                                  " tasks, and the group " + std::to_string(members.size()));
  }
  return enqueue(stream_of(stream), [update] {
    for (std::size_t i = 0; i < update->tasks.size(); ++i) {
      update->graph->tasks[update->group->members[i]].task = update->tasks[i];
    }
    return 0;
  });
}

aclError aclmdlRIDebugPrint(aclmdlRI model) {
  ACLSIM_ENTER();
  std::printf("a simulated graph of %zu tasks\n", graph_of(model)->tasks.size());
  return 0;
}

aclError aclmdlRIDebugJsonPrint(aclmdlRI model, const char* path, uint32_t) {
  ACLSIM_ENTER();
  std::ofstream file(path);
  file << "{\"tasks\": " << graph_of(model)->tasks.size() << "}\n";
  return file.good() ? 0 : refuse(ACL_ERROR_RT_PARAM_INVALID, std::string("cannot write ") + path);
}

}  // extern "C"
