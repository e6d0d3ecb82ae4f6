#include "device.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <sstream>

namespace allocator {
namespace {

constexpr std::array<const char*, SLEEP_POOL_CALLS> kCallNames = {
    "reserve",   "unreserve", "create",  "release", "map",  "unmap",       "host_alloc",
    "host_free", "copy_out",  "copy_in", "wait",    "fill", "synchronize", "memory_info"};

// Never destroyed: tensors are freed after static destruction began.
std::map<std::string, DriverFactory>& factories() {
  static auto* const map = new std::map<std::string, DriverFactory>;
  return *map;
}

std::string known_kinds() {
  std::string kinds;
  for (const auto& [kind, factory] : factories()) kinds += (kinds.empty() ? "" : ", ") + kind;
  return kinds;
}

void copy_text(char* to, std::size_t capacity, const std::string& from) {
  const std::size_t length = std::min(capacity - 1, from.size());
  std::memcpy(to, from.data(), length);
  to[length] = '\0';
}

}  // namespace

DriverRegistration::DriverRegistration(const char* kind, DriverFactory factory) {
  factories()[kind] = factory;
}

const char* call_name(int call) { return call >= 0 && call < SLEEP_POOL_CALLS ? kCallNames[call] : ""; }

Failure make_failure(int code, const std::string& phase, const std::string& tag, const std::string& message) {
  auto failure = std::make_unique<sleep_pool_error>();
  failure->code = code;
  copy_text(failure->phase, sizeof failure->phase, phase);
  copy_text(failure->tag, sizeof failure->tag, tag);
  copy_text(failure->message, sizeof failure->message, message);
  return failure;
}

Failure Device::open(const std::string& kind, int index, std::unique_ptr<Device>* device) {
  const auto factory = factories().find(kind);
  if (factory == factories().end()) {
    return make_failure(SLEEP_POOL_INVALID_ARGUMENT, "open", "",
                        "no driver for device '" + kind + "' in this build, only for: " + known_kinds());
  }
  std::unique_ptr<Driver> driver;
  if (Status status = factory->second(index, &driver); !status.ok()) {
    return make_failure(SLEEP_POOL_DRIVER, "open", "", status.message);
  }
  std::unique_ptr<Device> opened(new Device(index, std::move(driver)));
  if (Failure failure = opened->read_faults(std::getenv("SLEEP_POOL_FAULT"))) return failure;
  *device = std::move(opened);
  return nullptr;
}

// "create:3,copy_out:1": the third create and the first copy_out fail.
Failure Device::read_faults(const char* order) {
  std::istringstream items(order == nullptr ? "" : order);
  std::string item;
  while (std::getline(items, item, ',')) {
    const std::string name = item.substr(0, item.find(':'));
    const auto call = std::find(kCallNames.begin(), kCallNames.end(), name);
    const std::uint64_t nth =
        std::strtoull(item.c_str() + std::min(item.size(), name.size() + 1), nullptr, 10);
    if (call == kCallNames.end() || nth == 0) {
      return make_failure(SLEEP_POOL_INVALID_ARGUMENT, "open", "",
                          "SLEEP_POOL_FAULT holds '" + item + "', want call:number such as create:3");
    }
    faults_[static_cast<std::size_t>(call - kCallNames.begin())] = nth;
  }
  return nullptr;
}

bool Device::fault_due(sleep_pool_call call) { return faults_[call] > 0 && --faults_[call] == 0; }

Failure Device::failed(sleep_pool_call call, const Subject& subject, const Status& status) {
  const bool memory = status.outcome == Outcome::kOutOfMemory;
  Failure failure = make_failure(memory ? SLEEP_POOL_OUT_OF_MEMORY : SLEEP_POOL_DRIVER, call_name(call),
                                 subject.tag, status.message);
  failure->pointer = reinterpret_cast<std::uintptr_t>(subject.pointer);
  failure->bytes = subject.bytes;
  MemoryInfo info;
  if (memory && driver_->memory_info(&info).ok()) {
    failure->needed = subject.bytes;
    failure->free = info.free_bytes;
  }
  return failure;
}

template <typename Action>
Failure Device::run(sleep_pool_call call, const Subject& subject, Action action) {
  const Status status = fault_due(call) ? Status::failed("injected fault") : action();
  if (!status.ok()) return failed(call, subject, status);
  ++calls_[call];
  return nullptr;
}

Failure Device::reserve(const std::string& tag, std::size_t bytes, char** base) {
  void* address = nullptr;
  Failure failure =
      run(SLEEP_POOL_RESERVE, {tag, nullptr, bytes}, [&] { return driver_->reserve(bytes, &address); });
  *base = static_cast<char*>(address);
  return failure;
}

Failure Device::unreserve(const Segment& segment) {
  return run(SLEEP_POOL_UNRESERVE, {segment.tag_name, segment.base, segment.bytes},
             [&] { return driver_->unreserve(segment.base, segment.bytes); });
}

Failure Device::create(Segment& segment) {
  return run(SLEEP_POOL_CREATE, {segment.tag_name, segment.base, segment.bytes},
             [&] { return driver_->create(segment.bytes, &segment.handle); });
}

Failure Device::release(Segment& segment) {
  Failure failure = run(SLEEP_POOL_RELEASE, {segment.tag_name, segment.base, segment.bytes},
                        [&] { return driver_->release(segment.handle); });
  if (!failure) segment.handle = 0;
  return failure;
}

Failure Device::map(Segment& segment) {
  Failure failure = run(SLEEP_POOL_MAP, {segment.tag_name, segment.base, segment.bytes},
                        [&] { return driver_->map(segment.base, segment.bytes, segment.handle); });
  if (!failure) segment.mapped = true;
  return failure;
}

Failure Device::unmap(Segment& segment) {
  Failure failure = run(SLEEP_POOL_UNMAP, {segment.tag_name, segment.base, segment.bytes},
                        [&] { return driver_->unmap(segment.base, segment.bytes); });
  if (!failure) segment.mapped = false;
  return failure;
}

Failure Device::copy_out(const Segment& segment, const HostArena& arena, const CopyRun& run_) {
  return run(SLEEP_POOL_COPY_OUT, {segment.tag_name, segment.base, segment.bytes}, [&] {
    return driver_->copy_out(arena.base + run_.host_offset, segment.base + run_.offset, run_.bytes);
  });
}

Failure Device::copy_in(const Segment& segment, const CopyRun& run_) {
  return run(SLEEP_POOL_COPY_IN, {segment.tag_name, segment.base, segment.bytes}, [&] {
    return driver_->copy_in(segment.base + run_.offset, segment.backup->base + run_.host_offset, run_.bytes);
  });
}

Failure Device::fill(const Segment& segment, unsigned char value) {
  return run(SLEEP_POOL_FILL, {segment.tag_name, segment.base, segment.bytes},
             [&] { return driver_->fill(segment.base, value, segment.bytes); });
}

Failure Device::wait(const Segment& segment, Ticket ticket) {
  return run(SLEEP_POOL_WAIT, {segment.tag_name, segment.base, segment.bytes},
             [&] { return driver_->wait(ticket); });
}

Failure Device::host_alloc(const std::string& tag, HostArena& arena) {
  void* memory = nullptr;
  Failure failure = run(SLEEP_POOL_HOST_ALLOC, {tag, nullptr, arena.bytes},
                        [&] { return driver_->host_alloc(arena.bytes, &memory); });
  arena.base = static_cast<char*>(memory);
  return failure;
}

Failure Device::host_free(const std::string& tag, const HostArena& arena) {
  return run(SLEEP_POOL_HOST_FREE, {tag, arena.base, arena.bytes},
             [&] { return driver_->host_free(arena.base, arena.bytes); });
}

Failure Device::synchronize() {
  return run(SLEEP_POOL_SYNCHRONIZE, {}, [&] { return driver_->synchronize(); });
}

Failure Device::memory_info(MemoryInfo* info) {
  return run(SLEEP_POOL_MEMORY_INFO, {}, [&] { return driver_->memory_info(info); });
}

Failure Device::set_capacity(std::size_t bytes) {
  const Status status = driver_->set_capacity(bytes);
  return status.ok() ? nullptr : make_failure(SLEEP_POOL_DRIVER, "set_capacity", "", status.message);
}

}  // namespace allocator
