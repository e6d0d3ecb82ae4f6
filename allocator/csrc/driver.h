// What the pool asks of a device: one implementation a kind of device, each in one file.
//
// The model is virtual memory management as CUDA and AscendCL have it: an address range is reserved, physical
// memory comes as a handle, a handle is mapped whole at the start of a reservation and is never split.
// Each call either does all of its work or none of it, and says which: a failed call leaves things as they
// were.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

namespace allocator {

enum class Outcome { kOk, kOutOfMemory, kFailed };

struct Status {
  Outcome outcome = Outcome::kOk;
  std::string message;  // the driver's own words, with its error code

  bool ok() const { return outcome == Outcome::kOk; }
  static Status failed(std::string message) { return {Outcome::kFailed, std::move(message)}; }
  static Status out_of_memory(std::string message) { return {Outcome::kOutOfMemory, std::move(message)}; }
};

using Handle = std::uint64_t;  // physical memory; 0 is "none"
using Ticket = std::uint64_t;  // stands for copies under way; 0 is "none"

struct MemoryInfo {
  std::size_t free_bytes = 0;
  std::size_t total_bytes = 0;
};

class Driver {
 public:
  virtual ~Driver() = default;

  // Sizes given to reserve and create are multiples of this, and a power of two.
  virtual std::size_t granularity() const = 0;
  // About how large physical handles are to be, unless someone says otherwise. A call costs the same whatever the size,
  // but a handle goes back whole, when all of it has been copied.
  virtual std::size_t handle_bytes() const { return std::size_t{2} << 30; }

  virtual Status reserve(std::size_t bytes, void** address) = 0;
  virtual Status unreserve(void* address, std::size_t bytes) = 0;
  virtual Status create(std::size_t bytes, Handle* handle) = 0;
  virtual Status release(Handle handle) = 0;
  // Once in a handle's life.
  virtual Status map(void* address, std::size_t bytes, Handle handle) = 0;
  // The physical memory stays with the handle until release.
  virtual Status unmap(void* address, std::size_t bytes) = 0;

  // Host memory at its exact size that copies at the link's full speed (pinned where there is a link). Called
  // from this many threads at once where a large backup is made; 1: making it costs nothing.
  virtual std::size_t host_threads() const = 0;
  virtual Status host_alloc(std::size_t bytes, void** memory) = 0;
  virtual Status host_free(void* memory, std::size_t bytes) = 0;

  // Copies and fills may run asynchronously. A ticket stands for those since the ticket before it; it is waited
  // for, once, to know that they are done and went well.
  virtual Status copy_out(void* host, const void* device, std::size_t bytes) = 0;
  virtual Status copy_in(void* device, const void* host, std::size_t bytes) = 0;
  virtual Status fill(void* device, unsigned char value, std::size_t bytes) = 0;
  virtual Status mark(Ticket* ticket) = 0;
  virtual Status wait(Ticket ticket) = 0;

  // Waits until nothing on the device uses its memory any more; no ticket is left to wait for.
  virtual Status synchronize() = 0;
  virtual Status memory_info(MemoryInfo* info) = 0;

  // Limits how much physical memory create hands out; 0 lifts the limit. Only simulated devices can.
  virtual Status set_capacity(std::size_t bytes) = 0;
};

using DriverFactory = Status (*)(int device, std::unique_ptr<Driver>* driver);

// A driver's file holds one object of this at namespace scope; kind is torch's name of the device type.
struct DriverRegistration {
  DriverRegistration(const char* kind, DriverFactory factory);
};

// True when a host driver of this process, or of the process it was forked from, handed out the address.
// Takes no lock, so that the CPU hook can ask it of every tensor torch frees.
bool host_window_contains(const void* address) noexcept;

}  // namespace allocator
