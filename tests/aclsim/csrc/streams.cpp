// Streams and events.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>

#include "graphs.h"

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

// Shared with the tasks that record it and wait for it: an event may be destroyed before they have run.
using EventPointer = std::shared_ptr<Event>;
EventPointer& event_of(aclrtEvent event) { return *static_cast<EventPointer*>(event); }

bool is_done(const Event& event) { return event.done >= event.recorded; }

bool exists(const Stream* stream) {
  for (int i = 0; i < device_count(); ++i) {
    if (stream == &device(i).default_stream) return true;
  }
  return std::find(streams().begin(), streams().end(), stream) != streams().end();
}

int take_error_of(Stream* stream) { return exists(stream) ? std::exchange(stream->error, 0) : 0; }

// Runs tasks until `enough`, or until one cannot go on yet.
void advance(Stream* stream, const std::function<bool()>& enough) {
  if (stream->running) return;
  stream->running = true;
  while (!stream->tasks.empty() && !enough()) {
    const int error = stream->tasks.front()();
    if (error == kAclsimAgain) break;
    stream->tasks.pop_front();
    ++stream->finished;
    if (stream->error == 0) stream->error = error;
  }
  stream->running = false;
}

// Waits for `done` as a host thread does: other threads may use the simulator while nothing can be run.
int wait(Stream* stream, const std::function<bool()>& done) {
  int microseconds = 20;
  for (advance(stream, done); exists(stream) && !done() && !stream->running; advance(stream, done)) {
    lock().unlock();
    usleep(static_cast<useconds_t>(microseconds));
    microseconds = std::min(microseconds + microseconds / 4, 1000);
    lock().lock();
  }
  return take_error_of(stream);
}

int drain(Stream* stream) {
  const std::uint64_t last = stream->finished + stream->tasks.size();
  return wait(stream, [stream, last] { return stream->finished >= last; });
}

int finish(const EventPointer& event) {
  if (is_done(*event)) return take_error_of(event->stream);
  return wait(event->stream, [event] { return is_done(*event); });
}

bool never() { return false; }

int refuse_captured(const Event& event, const char* call) {
  if (!event.captured) return 0;
  if (exists(event.stream) && refuse_wait(*event.stream, call) != 0) return ACL_ERROR_RT_EVENT_CAPTURED;
  return refuse(ACL_ERROR_RT_EVENT_CAPTURED, std::string(call) + ": the event was recorded during a capture");
}

}  // namespace

Stream* stream_of(void* stream) {
  return stream == nullptr ? &current_device().default_stream : static_cast<Stream*>(stream);
}

Stream::Stream() = default;
Stream::~Stream() = default;

void advance_all(Stream* stream) { advance(stream, never); }

int enqueue(Stream* stream, std::function<int()> task, const std::vector<Range>& writes) {
  if (stream->update != nullptr) {
    stream->update->tasks.push_back(std::move(task));
    return 0;
  }
  if (stream->capture != nullptr) return record_task(stream, std::move(task), writes);
  if (!lazy() && stream->tasks.empty()) {
    const int error = task();
    if (error != kAclsimAgain) return error;
  }
  stream->tasks.push_back(std::move(task));
  if (!lazy()) advance(stream, never);
  return 0;
}

std::vector<Stream*> all_streams() {
  std::vector<Stream*> all(streams().begin(), streams().end());
  for (int i = 0; i < device_count(); ++i) all.push_back(&device(i).default_stream);
  return all;
}

int drain_all() {
  int first = 0;
  for (Stream* stream : all_streams()) {
    if (!exists(stream)) continue;  // another thread may destroy streams during a wait
    const int error = drain(stream);
    if (first == 0) first = error;
  }
  return first;
}

void settle_all() {
  for (Stream* stream : all_streams()) {
    if (!exists(stream)) continue;
    const int error = drain(stream);
    if (exists(stream)) stream->error = error;
  }
}

std::size_t pending_tasks() {
  std::size_t tasks = 0;
  for (const Stream* stream : all_streams()) tasks += stream->tasks.size();
  return tasks;
}

}  // namespace aclsim

using namespace aclsim;

void aclsim_advance(void* stream, const std::function<bool()>& enough) {
  const Guard guard(lock());
  if (exists(static_cast<Stream*>(stream))) advance(static_cast<Stream*>(stream), enough);
}

void* aclsim_stream(void* stream) { return stream_of(stream); }

bool aclsim_is_lazy() { return lazy(); }

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
  if (const int error = refuse_wait(*stream_of(stream), __func__)) return error;
  return drain(stream_of(stream));
}

aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t) { return aclrtSynchronizeStream(stream); }

aclError aclrtSynchronizeDevice() {
  ACLSIM_ENTER();
  if (const int error = refuse_wait_for_all(__func__)) return error;
  return drain_all();
}

aclError aclrtSynchronizeDeviceWithTimeout(int32_t) { return aclrtSynchronizeDevice(); }

// Asking is a moment at which work may have been done: without it a program that polls would poll forever.
aclError aclrtStreamQuery(aclrtStream stream, aclrtStreamStatus* status) {
  ACLSIM_ENTER();
  if (const int error = refuse_wait(*stream_of(stream), __func__)) return error;
  const bool empty = stream_of(stream)->tasks.empty();
  *status = empty ? ACL_STREAM_STATUS_COMPLETE : ACL_STREAM_STATUS_NOT_READY;
  advance(stream_of(stream), never);
  return take_error_of(stream_of(stream));
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
  *event = new EventPointer(std::make_shared<Event>());
  return 0;
}

aclError aclrtCreateEventExWithFlag(aclrtEvent* event, uint32_t flags) {
  const aclError error = aclrtCreateEvent(event);
  if (error == 0) event_of(*event)->external = (flags & ACL_EVENT_EXTERNAL) != 0;
  return error;
}

aclError aclrtCreateEventWithFlag(aclrtEvent* event, uint32_t) { return aclrtCreateEvent(event); }

aclError aclrtDestroyEvent(aclrtEvent event) {
  const Guard guard(lock());
  delete &event_of(event);
  return 0;
}

aclError aclrtRecordEvent(aclrtEvent event, aclrtStream stream) {
  ACLSIM_ENTER();
  const EventPointer recorded = event_of(event);
  recorded->stream = stream_of(stream);
  recorded->captured = recorded->stream->capture != nullptr;
  if (recorded->captured) return record_event(recorded->stream, recorded.get());
  return enqueue(recorded->stream, [recorded, record = ++recorded->recorded] {
    recorded->done = record;
    recorded->nanoseconds = now();
    return 0;
  });
}

aclError aclrtResetEvent(aclrtEvent, aclrtStream) { return 0; }

aclError aclrtStreamWaitEvent(aclrtStream stream, aclrtEvent event) {
  ACLSIM_ENTER();
  const EventPointer awaited = event_of(event);
  Stream* const waiting = stream_of(stream);
  const bool from_outside = waiting->capture != nullptr && awaited->recorded > 0;
  if (awaited->captured || from_outside) return record_wait(waiting, *awaited);
  return enqueue(waiting, [awaited, waiting, source = awaited->stream, record = awaited->recorded] {
    const auto done = [&] { return awaited->done >= record; };
    if (!done() && exists(source)) advance(source, done);
    if (!done()) return kAclsimAgain;
    // Not returned, where it would be this call's: the error is of the work that was waited for.
    if (waiting->error == 0) waiting->error = take_error_of(source);
    return 0;
  });
}

aclError aclrtSynchronizeEvent(aclrtEvent event) {
  ACLSIM_ENTER();
  if (const int error = refuse_captured(*event_of(event), __func__)) return error;
  return finish(event_of(event));
}

aclError aclrtQueryEventStatus(aclrtEvent event, aclrtEventRecordedStatus* status) {
  ACLSIM_ENTER();
  const EventPointer asked = event_of(event);
  if (const int error = refuse_captured(*asked, __func__)) return error;
  const bool done = is_done(*asked);
  *status = done ? ACL_EVENT_RECORDED_STATUS_COMPLETE : ACL_EVENT_RECORDED_STATUS_NOT_READY;
  // An error stays with the stream, for the one who waits for it.
  if (!done) advance(asked->stream, [&] { return is_done(*asked); });
  return 0;
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
