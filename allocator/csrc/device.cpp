#include "device.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <sstream>
#include <utility>

namespace allocator {
namespace {

constexpr std::array<const char*, SLEEP_POOL_CALLS> kCallNames = {
    "reserve",   "unreserve", "create",  "release", "map",  "unmap",       "host_alloc",
    "host_free", "copy_out",  "copy_in", "mark",    "wait", "fill",        "synchronize", "memory_info"};

// Of an arena: small enough that the first is made soon, large enough that there are few.
constexpr std::size_t kSmallestChunk = std::size_t{32} << 20;
constexpr std::size_t kLargestChunk = std::size_t{256} << 20;
constexpr std::size_t kChunkMultiple = std::size_t{2} << 20;  // a huge page

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

Subject about(const Piece& piece) { return {piece.segment->tag_name, piece.base, piece.bytes}; }

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
  if (Failure failure = opened->read_piece_bytes(std::getenv("SLEEP_POOL_HANDLE_MIB"))) return failure;
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

Failure Device::read_piece_bytes(const char* mebibytes) {
  if (mebibytes == nullptr) return nullptr;
  char* end = nullptr;
  const std::uint64_t read = std::strtoull(mebibytes, &end, 10);
  if (*end == '\0' && read > 0 && read < (std::uint64_t{1} << 30)) return set_piece_bytes(read << 20);
  return make_failure(SLEEP_POOL_INVALID_ARGUMENT, "open", "",
                      std::string("SLEEP_POOL_HANDLE_MIB holds '") + mebibytes + "', want MiB such as 256");
}

Failure Device::set_piece_bytes(std::size_t bytes) {
  if (bytes == 0 || bytes % granularity() != 0) {
    return make_failure(SLEEP_POOL_INVALID_ARGUMENT, "set_handle_bytes", "",
                        std::to_string(bytes) + " bytes are no multiple of the device's granularity of " +
                            std::to_string(granularity()));
  }
  piece_bytes_ = bytes;
  return nullptr;
}

std::size_t Device::piece_bytes(std::size_t segment_bytes) const {
  const std::size_t count = std::max<std::size_t>(1, (segment_bytes + piece_bytes_ / 2) / piece_bytes_);
  return round_up((segment_bytes + count - 1) / count, granularity());
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

Failure Device::create(Piece& piece) {
  Failure failure =
      run(SLEEP_POOL_CREATE, about(piece), [&] { return driver_->create(piece.bytes, &piece.handle); });
  if (!failure) held_bytes_ += piece.bytes;
  return failure;
}

Failure Device::release(Piece& piece) {
  Failure failure = run(SLEEP_POOL_RELEASE, about(piece), [&] { return driver_->release(piece.handle); });
  if (failure) return failure;
  piece.handle = 0;
  held_bytes_ -= piece.bytes;
  return nullptr;
}

Failure Device::map(Piece& piece) {
  Failure failure =
      run(SLEEP_POOL_MAP, about(piece), [&] { return driver_->map(piece.base, piece.bytes, piece.handle); });
  if (!failure) piece.mapped = true;
  return failure;
}

Failure Device::unmap(Piece& piece) {
  Failure failure =
      run(SLEEP_POOL_UNMAP, about(piece), [&] { return driver_->unmap(piece.base, piece.bytes); });
  if (!failure) piece.mapped = false;
  return failure;
}

Failure Device::copy_out(const Piece& piece, const CopyRun& part) {
  return run(SLEEP_POOL_COPY_OUT, about(piece),
             [&] { return driver_->copy_out(part.host, piece.base + part.offset, part.bytes); });
}

Failure Device::copy_in(const Piece& piece, const CopyRun& part) {
  return run(SLEEP_POOL_COPY_IN, about(piece),
             [&] { return driver_->copy_in(piece.base + part.offset, part.host, part.bytes); });
}

Failure Device::fill(const Piece& piece, unsigned char value) {
  return run(SLEEP_POOL_FILL, about(piece), [&] { return driver_->fill(piece.base, value, piece.bytes); });
}

Failure Device::mark(Piece& piece) {
  return run(SLEEP_POOL_MARK, about(piece), [&] { return driver_->mark(&piece.ticket); });
}

Failure Device::wait(Piece& piece) {
  const Ticket ticket = std::exchange(piece.ticket, 0);
  if (ticket == 0) return nullptr;
  return run(SLEEP_POOL_WAIT, about(piece), [&] { return driver_->wait(ticket); });
}

std::unique_ptr<HostArena> Device::start_host(std::size_t bytes) {
  const std::size_t threads = driver_->host_threads();
  const std::size_t share = round_up(bytes / threads, kChunkMultiple);
  const std::size_t chunk = threads == 1 ? bytes : std::clamp(share, kSmallestChunk, kLargestChunk);
  auto arena = std::make_unique<HostArena>(bytes, chunk);
  std::vector<char> faults(arena->chunk_count());  // decided here: the threads must not count
  for (char& fault : faults) fault = fault_due(SLEEP_POOL_HOST_ALLOC);
  arena->start(threads, [driver = driver_.get(), faults](std::size_t i, std::size_t size, void** memory) {
    return faults[i] ? Status::failed("injected fault") : driver->host_alloc(size, memory);
  });
  return arena;
}

Failure Device::wait_host(const std::string& tag, const HostArena& arena, std::size_t chunk) {
  const Status status = arena.wait(chunk);
  return status.ok() ? nullptr : failed(SLEEP_POOL_HOST_ALLOC, {tag, nullptr, arena.bytes()}, status);
}

Failure Device::finish_host(const std::string& tag, HostArena& arena) {
  arena.join();
  Failure failure;
  for (std::size_t i = 0; i < arena.chunk_count(); ++i) {
    Failure of_chunk = wait_host(tag, arena, i);
    if (!of_chunk) ++calls_[SLEEP_POOL_HOST_ALLOC];
    if (!failure) failure = std::move(of_chunk);
  }
  return failure;
}

Failure Device::free_host(const std::string& tag, HostArena& arena, std::uint64_t* freed) {
  for (HostArena::Chunk& chunk : arena.chunks()) {
    if (chunk.memory == nullptr) continue;
    Failure failure = run(SLEEP_POOL_HOST_FREE, {tag, chunk.memory, chunk.bytes},
                          [&] { return driver_->host_free(chunk.memory, chunk.bytes); });
    if (failure) return failure;
    chunk.memory = nullptr;
    *freed += chunk.bytes;
  }
  return nullptr;
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
