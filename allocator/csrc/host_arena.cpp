#include "host_arena.h"

#include <algorithm>
#include <new>
#include <system_error>
#include <utility>

namespace allocator {

HostArena::HostArena(std::size_t bytes, std::size_t chunk_bytes) : bytes_(bytes), chunk_bytes_(chunk_bytes) {
  for (std::size_t begin = 0; begin < bytes; begin += chunk_bytes) {
    chunks_.push_back({std::min(chunk_bytes, bytes - begin)});
  }
  promises_.resize(chunks_.size());
  for (auto& promise : promises_) made_.push_back(promise.get_future().share());
}

void HostArena::start(std::size_t threads, MakeChunk make) {
  make_ = std::move(make);
  const std::size_t wanted = threads == 1 ? 0 : std::min(threads, chunks_.size());
  try {
    while (threads_.size() < wanted) threads_.emplace_back([this] { make_chunks(); });
  } catch (const std::system_error&) {
    // The process may have no more threads: fewer do as well, and so does this one.
  }
  if (threads_.empty()) make_chunks();
}

void HostArena::make_chunks() {
  for (std::size_t i = next_++; i < chunks_.size(); i = next_++) {
    promises_[i].set_value(make_chunk(i));
  }
}

// An exception that leaves a thread would end the process.
Status HostArena::make_chunk(std::size_t index) noexcept {
  try {
    return make_(index, chunks_[index].bytes, &chunks_[index].memory);
  } catch (const std::bad_alloc&) {
    return Status::out_of_memory("no host memory");  // short enough to need none
  }
}

void HostArena::join() {
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

char* HostArena::at(std::size_t offset) const {
  const std::size_t chunk = chunk_of(offset);
  return static_cast<char*>(chunks_[chunk].memory) + (offset - chunk * chunk_bytes_);
}

std::size_t HostArena::held_bytes() const {
  std::size_t held = 0;
  for (const Chunk& chunk : chunks_) held += chunk.memory == nullptr ? 0 : chunk.bytes;
  return held;
}

}  // namespace allocator
