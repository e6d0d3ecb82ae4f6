// A segment: one reservation, backed by pieces of physical memory, and cut into blocks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "driver.h"
#include "host_arena.h"

namespace allocator {

class Segment;
class Tag;

constexpr std::size_t kAlignment = 64;

inline std::size_t round_up(std::size_t bytes, std::size_t multiple) {
  return (bytes + multiple - 1) / multiple * multiple;
}

struct FreeBlock {
  std::size_t bytes;
  char* address;
  Segment* segment;

  bool operator<(const FreeBlock& other) const {
    return bytes != other.bytes ? bytes < other.bytes : address < other.address;
  }
};

// A tag's free blocks by size: the first that is not too small is the best fit.
using FreeIndex = std::set<FreeBlock>;

// Live bytes of a piece that lie in a row, and where their backup is.
struct CopyRun {
  std::size_t offset;  // from the piece's base
  std::size_t bytes;
  char* host;
};

// One physical handle's share of a segment: what goes and comes back at once. The pool keeps its fields true
// after each driver call.
struct Piece {
  Segment* segment;
  char* base;
  std::size_t bytes;

  bool resident = true;  // its content is there; otherwise the content is in the backup, or was discarded
  bool mapped = false;
  Handle handle = 0;
  Ticket ticket = 0;            // of the copies or the fill under way
  HostArena* backup = nullptr;  // where the runs' host memory is
  std::vector<CopyRun> runs;
};

class Segment {
 public:
  // Blocks of a segment that is given no index are not allocated a second time.
  Segment(Tag* tag, const std::string& tag_name, char* base, std::size_t bytes, std::size_t piece_bytes,
          FreeIndex* index);

  void* take(char* address, std::size_t bytes);
  // False when no live block starts there.
  bool give_back(char* address);
  void leave_index();

  // Where the content of the allocations lies, when who allocated cuts them up himself: in what is added from here on.
  // Until then, all that is allocated is content.
  void forget_live() {
    live_.clear();
    knows_live_ = true;
  }
  void add_live(const char* address, std::size_t bytes);
  // What is no content although it lives, from here on.
  void forget_droppable() { droppable_.clear(); }
  void drop(const char* address, std::size_t bytes);

  bool empty() const { return allocations_ == 0; }
  bool dying() const { return dying_; }
  void die() { dying_ = true; }
  std::size_t allocations() const { return allocations_; }
  std::size_t live_bytes() const { return live_bytes_; }  // as asked for
  // The content of each piece, rounded to the alignment; no host memory is assigned yet.
  std::vector<std::vector<CopyRun>> content() const;

  Tag* const tag;
  const std::string& tag_name;
  char* const base;
  const std::size_t bytes;
  std::vector<Piece> pieces;  // without gaps, each but the last of the same size

 private:
  struct Block {
    std::size_t bytes;
    std::size_t requested;  // 0: free
  };
  using Blocks = std::map<std::size_t, Block>;  // by offset, without gaps

  void merge_with_next(Blocks::iterator block);
  void index_add(Blocks::const_iterator block);
  void index_remove(Blocks::const_iterator block);

  FreeIndex* index_;
  Blocks blocks_;
  std::vector<std::pair<std::size_t, std::size_t>> live_ranges() const;  // offset and bytes, in order

  std::map<std::size_t, std::size_t> live_;       // bytes by offset, rounded to the alignment
  bool knows_live_ = false;
  std::map<std::size_t, std::size_t> droppable_;  // bytes by offset, not overlapping
  bool dying_ = false;                       // empty, and not all of it could be returned to the driver yet
  std::size_t allocations_ = 0;
  std::size_t live_bytes_ = 0;
};

std::size_t total_bytes(const std::vector<CopyRun>& runs);

}  // namespace allocator
