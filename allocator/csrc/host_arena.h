// Host memory for one tag's backup: chunks that several threads make, the first ones first, so that copies into
// them can begin before the last is there.
#pragma once

#include <atomic>
#include <cstddef>
#include <functional>
#include <future>
#include <thread>
#include <vector>

#include "driver.h"

namespace allocator {

class HostArena {
 public:
  // Makes one chunk; called from several threads at once.
  using MakeChunk = std::function<Status(std::size_t index, std::size_t bytes, void** memory)>;

  HostArena(std::size_t bytes, std::size_t chunk_bytes);
  ~HostArena() { join(); }
  HostArena(const HostArena&) = delete;
  HostArena& operator=(const HostArena&) = delete;

  void start(std::size_t threads, MakeChunk make);
  // Until the chunk is there, or could not be made.
  Status wait(std::size_t chunk) const { return made_[chunk].get(); }
  void join();

  std::size_t chunk_count() const { return chunks_.size(); }
  std::size_t chunk_of(std::size_t offset) const { return offset / chunk_bytes_; }
  std::size_t chunk_end(std::size_t chunk) const { return chunk * chunk_bytes_ + chunks_[chunk].bytes; }
  char* at(std::size_t offset) const;

  struct Chunk {
    std::size_t bytes;
    void* memory = nullptr;  // null: not made, or returned
  };
  std::vector<Chunk>& chunks() { return chunks_; }

  std::size_t bytes() const { return bytes_; }  // as asked for
  std::size_t held_bytes() const;
  bool complete() const { return held_bytes() == bytes_; }

  std::size_t backups = 0;  // pieces whose content lies here

 private:
  void make_chunks();
  Status make_chunk(std::size_t index) noexcept;

  const std::size_t bytes_;
  const std::size_t chunk_bytes_;
  std::vector<Chunk> chunks_;
  std::vector<std::promise<Status>> promises_;
  std::vector<std::shared_future<Status>> made_;
  MakeChunk make_;
  std::atomic<std::size_t> next_{0};
  std::vector<std::thread> threads_;
};

}  // namespace allocator
