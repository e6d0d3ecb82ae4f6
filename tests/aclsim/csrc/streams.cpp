// Streams and events.
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "simulator.h"

namespace aclsim {
namespace {

std::vector<Stream*>& streams() {
  static auto* const made = new std::vector<Stream*>;
  return *made;
}

bool lazy() {
  static const bool value = [] {
    const char* mode = std::getenv("ACLSIM_STREAM");
    return mode != nullptr && std::strcmp(mode, "lazy") == 0;
  }();
  return value;
}

std::uint64_t now() {
  const auto time = std::chrono::steady_clock::now().time_since_epoch();
  return static_cast<std::uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(time).count());
}

Event* event_of(aclrtEvent event) { return static_cast<Event*>(event); }

bool is_done(const Event& event) { return event.done >= event.recorded; }

int finish(Event* event) { return is_done(*event) ? 0 : drain(event->stream, event, event->recorded); }

}  // namespace

Stream* stream_of(void* stream) {
  return stream == nullptr ? &current_device().default_stream : static_cast<Stream*>(stream);
}

int enqueue(Stream* stream, std::function<int()> task) {
  if (!lazy()) return task();
  stream->tasks.push_back(std::move(task));
  return 0;
}

int drain(Stream* stream, const Event* until, std::uint64_t record) {
  if (stream->running) return 0;
  stream->running = true;
  while (!stream->tasks.empty() && (until == nullptr || until->done < record)) {
    const std::function<int()> task = std::move(stream->tasks.front());
    stream->tasks.pop_front();
    const int error = task();
    if (stream->error == 0) stream->error = error;
  }
  stream->running = false;
  return std::exchange(stream->error, 0);
}

std::vector<Stream*> all_streams() {
  std::vector<Stream*> all(streams().begin(), streams().end());
  for (int i = 0; i < device_count(); ++i) all.push_back(&device(i).default_stream);
  return all;
}

int drain_all() {
  int first = 0;
  for (Stream* stream : all_streams()) {
    const int error = drain(stream);
    if (first == 0) first = error;
  }
  return first;
}

void settle_all() {
  for (Stream* stream : all_streams()) stream->error = drain(stream);
}

std::size_t pending_tasks() {
  std::size_t tasks = 0;
  for (const Stream* stream : all_streams()) tasks += stream->tasks.size();
  return tasks;
}

}  // namespace aclsim

using namespace aclsim;

extern "C" {

aclError aclrtCreateStream(aclrtStream* stream) {
  ACLSIM_ENTER();
  static int last_id = 0;
  auto* const made = new Stream;
  made->device = current_device().index;
  made->id = ++last_id;
  streams().push_back(made);
  *stream = made;
  return 0;
}

aclError aclrtCreateStreamWithConfig(aclrtStream* stream, uint32_t, uint32_t) { return aclrtCreateStream(stream); }

aclError aclrtDestroyStream(aclrtStream stream) {
  ACLSIM_ENTER();
  const int error = drain(stream_of(stream));
  streams().erase(std::remove(streams().begin(), streams().end(), stream), streams().end());
  delete static_cast<Stream*>(stream);
  return error;
}

aclError aclrtDestroyStreamForce(aclrtStream stream) { return aclrtDestroyStream(stream); }

aclError aclrtSynchronizeStream(aclrtStream stream) {
  ACLSIM_ENTER();
  return drain(stream_of(stream));
}

aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t) { return aclrtSynchronizeStream(stream); }

aclError aclrtSynchronizeDevice() {
  ACLSIM_ENTER();
  return drain_all();
}

aclError aclrtSynchronizeDeviceWithTimeout(int32_t) { return aclrtSynchronizeDevice(); }

// Asking is a moment at which work may have been done: without it a program that polls would poll forever.
aclError aclrtStreamQuery(aclrtStream stream, aclrtStreamStatus* status) {
  ACLSIM_ENTER();
  const bool empty = stream_of(stream)->tasks.empty();
  *status = empty ? ACL_STREAM_STATUS_COMPLETE : ACL_STREAM_STATUS_NOT_READY;
  return drain(stream_of(stream));
}

aclError aclrtStreamGetId(aclrtStream stream, int32_t* id) {
  *id = stream_of(stream)->id;
  return 0;
}

aclError aclrtCtxGetCurrentDefaultStream(aclrtStream* stream) {
  *stream = nullptr;
  return 0;
}

aclError aclrtCreateEvent(aclrtEvent* event) {
  *event = new Event;
  return 0;
}

aclError aclrtCreateEventExWithFlag(aclrtEvent* event, uint32_t) { return aclrtCreateEvent(event); }
aclError aclrtCreateEventWithFlag(aclrtEvent* event, uint32_t) { return aclrtCreateEvent(event); }

aclError aclrtDestroyEvent(aclrtEvent event) {
  const Guard guard(lock());
  const int error = finish(event_of(event));
  delete event_of(event);
  return error;
}

aclError aclrtRecordEvent(aclrtEvent event, aclrtStream stream) {
  ACLSIM_ENTER();
  Event* const recorded = event_of(event);
  recorded->stream = stream_of(stream);
  return enqueue(recorded->stream, [recorded, record = ++recorded->recorded] {
    recorded->done = record;
    recorded->nanoseconds = now();
    return 0;
  });
}

aclError aclrtResetEvent(aclrtEvent, aclrtStream) { return 0; }

aclError aclrtStreamWaitEvent(aclrtStream stream, aclrtEvent event) {
  ACLSIM_ENTER();
  Event* const awaited = event_of(event);
  return enqueue(stream_of(stream), [awaited, source = awaited->stream, record = awaited->recorded] {
    return awaited->done < record ? drain(source, awaited, record) : 0;
  });
}

aclError aclrtSynchronizeEvent(aclrtEvent event) {
  ACLSIM_ENTER();
  return finish(event_of(event));
}

aclError aclrtQueryEventStatus(aclrtEvent event, aclrtEventRecordedStatus* status) {
  ACLSIM_ENTER();
  const bool done = is_done(*event_of(event));
  *status = done ? ACL_EVENT_RECORDED_STATUS_COMPLETE : ACL_EVENT_RECORDED_STATUS_NOT_READY;
  return finish(event_of(event));
}

aclError aclrtQueryEventWaitStatus(aclrtEvent, aclrtEventWaitStatus* status) {
  *status = ACL_EVENT_WAIT_STATUS_COMPLETE;
  return 0;
}

aclError aclrtEventElapsedTime(float* milliseconds, aclrtEvent start, aclrtEvent end) {
  const std::uint64_t elapsed = event_of(end)->nanoseconds - event_of(start)->nanoseconds;
  *milliseconds = static_cast<float>(elapsed) * 1e-6F;
  return 0;
}

aclError aclrtLaunchCallback(aclrtCallback function, void* data, aclrtCallbackBlockType, aclrtStream stream) {
  ACLSIM_ENTER();
  return enqueue(stream_of(stream), [function, data] {
    function(data);
    return 0;
  });
}

}  // extern "C"
