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

  // The size of the pieces of a segment: the one that was set, or up to half more or less, so that they are alike.
  std::size_t piece_bytes(std::size_t segment_bytes) const;
  Failure set_piece_bytes(std::size_t bytes);

  // Each of these keeps the fields of what it is given true to what the driver did.
  Failure reserve(const std::string& tag, std::size_t bytes, char** base);
  Failure unreserve(const Segment& segment);
  Failure create(Piece& piece);
  Failure release(Piece& piece);
  Failure map(Piece& piece);
  Failure unmap(Piece& piece);
  Failure copy_out(const Piece& piece, const CopyRun& run);
  Failure copy_in(const Piece& piece, const CopyRun& run);
  Failure fill(const Piece& piece, unsigned char value);
  Failure mark(Piece& piece);
  Failure wait(Piece& piece);
  Failure synchronize();
  // Bytes of the handles that were created and not released: what this process holds of the device.
  std::size_t held_bytes() const { return held_bytes_; }

  // Begins to make the arena's chunks; from then on it is finished once, after a wait for each chunk that is used.
  std::unique_ptr<HostArena> start_host(std::size_t bytes);
  Failure wait_host(const std::string& tag, const HostArena& arena, std::size_t chunk);
  Failure finish_host(const std::string& tag, HostArena& arena);
  // Returns chunk by chunk; what could not be returned stays in the arena.
  Failure free_host(const std::string& tag, HostArena& arena, std::uint64_t* freed);

  Failure memory_info(MemoryInfo* info);
  Failure set_capacity(std::size_t bytes);

  void inject_fault(sleep_pool_call call, std::uint64_t nth) { faults_[call] = nth; }
  const std::array<std::uint64_t, SLEEP_POOL_CALLS>& calls() const { return calls_; }

 private:
  Device(int index, std::unique_ptr<Driver> driver)
      : index_(index), driver_(std::move(driver)), piece_bytes_(driver_->handle_bytes()) {}

  template <typename Action>
  Failure run(sleep_pool_call call, const Subject& subject, Action action);
  Failure failed(sleep_pool_call call, const Subject& subject, const Status& status);
  bool fault_due(sleep_pool_call call);
  Failure read_faults(const char* order);
  Failure read_piece_bytes(const char* mebibytes);

  const int index_;
  const std::unique_ptr<Driver> driver_;
  std::size_t piece_bytes_;
  std::size_t held_bytes_ = 0;
  std::array<std::uint64_t, SLEEP_POOL_CALLS> calls_{};
  std::array<std::uint64_t, SLEEP_POOL_CALLS> faults_{};  // how many calls from now; 0: never
};

const char* call_name(int call);

}  // namespace allocator
