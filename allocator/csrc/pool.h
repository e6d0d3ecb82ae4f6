// The pool: tags, what state their memory is in, and the moves between the states.
//
// Nothing here locks: the C ABI holds the one mutex around each call. Each move is made piece by piece, and each
// driver call is recorded in its piece when it is made, so after a failure the same call finishes what is left.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "device.h"
#include "segment.h"

namespace allocator {

class Pool;

// Segments of all pools by base address: how a pointer finds its owner.
using SegmentTable = std::map<char*, Segment*>;

class Tag {
 public:
  Tag(Pool* pool, std::string name) : pool(pool), name(std::move(name)) {}

  Pool* const pool;
  const std::string name;
  bool persistent = false;
  bool asleep = false;  // or partly, after a failure
  std::map<char*, std::unique_ptr<Segment>> segments;
  FreeIndex free_blocks;
  std::vector<std::unique_ptr<HostArena>> arenas;
  sleep_pool_phase last_sleep{};
  sleep_pool_phase last_wake{};
};

using Tags = std::vector<Tag*>;

class Pool {
 public:
  Pool(Device* device, SegmentTable* table, bool poison) : device_(device), table_(table), poison_(poison) {}

  Device& device() { return *device_; }
  Tag* find(const std::string& name) const;
  Tag& find_or_make(const std::string& name);
  const std::vector<std::unique_ptr<Tag>>& tags() const { return tags_; }

  Failure allocate(Tag& tag, std::size_t bytes, void** pointer);
  // The failure is the driver's when the segment could not be returned; it is tried again before the next
  // move.
  Failure free(Segment& segment, char* pointer);

  void forget_live();
  void forget_droppable();
  Failure sleep(const Tags& offload, const Tags& discard);
  // With all_or_nothing a failure leaves each of the tags as it was.
  Failure wake_up(Tags tags, bool all_or_nothing);

  // Host memory for offloading the tag as it is now: begun under the lock, made without it, and given to the tag
  // under the lock. Null when there is nothing to make.
  Failure start_host(Tag& tag, std::unique_ptr<HostArena>* arena);
  Failure finish_host(Tag& tag, std::unique_ptr<HostArena> arena);
  Failure release_host(std::uint64_t* released);
  // Copies what a sleeping tag's backup holds of an address range.
  Failure read_backup(const Tag& tag, const char* address, std::size_t bytes, char* to) const;

  void set_poison(bool poison) { poison_ = poison; }
  static sleep_pool_tag_stats stats(const Tag& tag);

 private:
  Failure add_segment(Tag& tag, std::size_t bytes, bool shared, Segment** segment);
  Failure bury(Segment& segment);
  Failure bury_dying();

  struct Move;  // a sleep or a wake-up under way

  Failure start_backup(Tag& tag, Move& move);
  Failure back_up(Piece& piece, HostArena& arena, std::size_t* arena_offset, Move& move);
  Failure let_go(Tag& tag, Move& move, bool (*chosen)(const Piece&));
  Failure let_go(Piece& piece, Move& move);
  void end_sleep(Tag& tag, Move& move, bool failed);
  Failure check_held() const;

  Failure bring_back(Tag& tag, Move& move);
  Failure bring_back(Piece& piece, Move& move);
  Failure await_copies(Move& move, std::size_t* complete);
  static void make_resident(const Move& move, std::size_t count);
  void take_back(Tag& tag);
  Failure check_free_memory(const Tags& tags);

  Failure find_or_start_arena(Tag& tag, std::size_t bytes, HostArena** arena, bool* started);
  Failure free_arenas(Tag& tag, const HostArena* except, std::uint64_t* freed);
  void free_incomplete(Tag& tag);

  Device* const device_;
  SegmentTable* const table_;
  bool poison_;
  std::vector<std::unique_ptr<Tag>> tags_;
  std::vector<Segment*> dying_;
};

}  // namespace allocator
