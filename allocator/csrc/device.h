// A driver with every call checked, counted and open to an injected fault, in terms of segments and arenas.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>

#include "capi.h"
#include "driver.h"
#include "segment.h"

namespace allocator {

// Null when all went well.
using Failure = std::unique_ptr<sleep_pool_error>;

Failure make_failure(int code, const std::string& phase, const std::string& tag, const std::string& message);

// What a driver call is for, to name it when the call fails.
struct Subject {
  std::string tag;
  const void* pointer = nullptr;
  std::size_t bytes = 0;
};

class Device {
 public:
  static Failure open(const std::string& kind, int index, std::unique_ptr<Device>* device);

  int index() const { return index_; }
  std::size_t granularity() const { return driver_->granularity(); }

  // Each of these keeps the segment's fields true to what the driver did.
  Failure reserve(const std::string& tag, std::size_t bytes, char** base);
  Failure unreserve(const Segment& segment);
  Failure create(Segment& segment);
  Failure release(Segment& segment);
  Failure map(Segment& segment);
  Failure unmap(Segment& segment);
  Failure copy_out(const Segment& segment, const HostArena& arena, const CopyRun& run);
  Failure copy_in(const Segment& segment, const CopyRun& run);
  Failure fill(const Segment& segment, unsigned char value);
  Failure wait(const Segment& segment, Ticket ticket);

  Failure host_alloc(const std::string& tag, HostArena& arena);
  Failure host_free(const std::string& tag, const HostArena& arena);
  Ticket ticket() { return driver_->ticket(); }
  Failure synchronize();
  Failure memory_info(MemoryInfo* info);
  Failure set_capacity(std::size_t bytes);

  void inject_fault(sleep_pool_call call, std::uint64_t nth) { faults_[call] = nth; }
  const std::array<std::uint64_t, SLEEP_POOL_CALLS>& calls() const { return calls_; }

 private:
  Device(int index, std::unique_ptr<Driver> driver) : index_(index), driver_(std::move(driver)) {}

  template <typename Action>
  Failure run(sleep_pool_call call, const Subject& subject, Action action);
  Failure failed(sleep_pool_call call, const Subject& subject, const Status& status);
  bool fault_due(sleep_pool_call call);
  Failure read_faults(const char* order);

  const int index_;
  const std::unique_ptr<Driver> driver_;
  std::array<std::uint64_t, SLEEP_POOL_CALLS> calls_{};
  std::array<std::uint64_t, SLEEP_POOL_CALLS> faults_{};  // how many calls from now; 0: never
};

const char* call_name(int call);

}  // namespace allocator
